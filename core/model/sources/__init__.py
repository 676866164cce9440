"""Resolves model references and reads config, tokenizer and tensors; uses files and the network, runs no model."""
