"""Several launches of compiled kernels at once, without Python between them."""
