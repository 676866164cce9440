"""Replaces layers of transformers by fused ones, after comparing each with its original; imports kernels, no engine."""
