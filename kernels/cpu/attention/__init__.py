"""The inner loops of attention on CPUs: one query per row (paged), and many queries per row (flash)."""
