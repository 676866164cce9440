"""Other ways to store the weights of linear layers: what plugins return, applied to a model; and core's own."""
