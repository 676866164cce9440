"""The inner parts of attention on CPUs: one query a row (paged), and many (flash)."""
