"""GGUF files, as llama.cpp has them: prepared once for serving, their tensors read where they are."""
