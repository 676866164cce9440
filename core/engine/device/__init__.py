"""Where a model's tensors are: how values are copied there and back."""
