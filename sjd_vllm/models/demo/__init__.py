"""The demo model: a small Llama over the codes of a small VQ autoencoder."""
