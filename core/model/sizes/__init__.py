"""The memory that a model needs, computed without its weights."""
