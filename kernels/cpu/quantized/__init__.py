"""Quantised numbers on CPUs: products of rows with weights (rows, codes, tiles, panels, gemm), and the KV cache."""
