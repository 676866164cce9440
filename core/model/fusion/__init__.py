"""Layers of transformers replaced by fused ones: recognised by their parts, proved, replayed."""
