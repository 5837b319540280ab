"""Model families that sjd-vllm can decode."""
