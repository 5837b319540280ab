"""Compiled forms of what `sjd_vllm.core` defines; the core is their reference, and what runs where they do not."""
