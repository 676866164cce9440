"""Which requests run, and what each forward pass computes."""
