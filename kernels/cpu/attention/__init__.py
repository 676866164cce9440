"""Attention kernels for CPUs: one query per row (paged), and many queries per row (flash)."""
