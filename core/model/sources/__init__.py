"""Resolves model references and reads config, tokenizer and tensors; uses files and the network, runs no model."""

from __future__ import annotations

DEMO = "demo:"
"""The prefix of references to models of the catalogue."""
