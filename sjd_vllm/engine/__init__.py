"""The only part that touches vLLM's insides: admission, scheduling of guidance pairs, drafting and scoring."""
