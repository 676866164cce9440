"""Quantised numbers on CPUs: products of rows with weights (rows, codes, tiles, and the launch), and the KV cache."""
