"""Lumina-mGPT 2.0."""
