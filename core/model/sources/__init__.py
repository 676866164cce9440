"""From a model reference to a folder, its settings, its tokenizer and its tensors."""
