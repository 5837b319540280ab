"""SimpleAR: a Qwen2 with an image vocabulary behind its own, and NVIDIA's Cosmos tokenizer for pixels."""
