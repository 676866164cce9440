"""What is compared with transformers when a model is loaded: attention, heads, and rows of the deterministic mode."""
