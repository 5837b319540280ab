"""Janus and Janus-Pro: text and image codes under one Llama, each with an embedding and a head of its own."""
