"""Chameleon and Anole, and the decoder and pixels of Lumina-mGPT."""
