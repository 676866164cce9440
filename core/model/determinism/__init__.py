"""The deterministic mode: what is verified at load."""
