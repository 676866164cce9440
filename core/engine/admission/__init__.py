"""Turns messages of the front into requests, and waits until these can be admitted."""
