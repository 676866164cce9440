"""Numerical operations on tensors, one file each with its torch reference; imports torch and numpy, nothing of core."""
