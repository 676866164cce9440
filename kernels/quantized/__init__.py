"""Weights, keys and values as small integers, and linear layers that multiply them."""
