"""Lumina-mGPT (the first), on the decoder and pixels of Chameleon."""
