"""The product of rows with quantised weights on CPUs: rows, codes, tiles, and the launch."""
