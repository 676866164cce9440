"""Weights as small integers, and linear layers that multiply them."""
