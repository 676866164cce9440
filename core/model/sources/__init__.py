"""From a model reference to a folder, its config, tokenizer and tensors; reads files and the network, runs no model."""
