"""Folders with quantised weights, as GPTQ, AWQ and compressed-tensors write them."""
