"""Sampling parameters as clients send them, and how the stage samples and stops by them."""
