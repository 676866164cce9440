"""Operations as Triton kernels, for GPUs. Imported only when the backend is chosen, since ``triton`` is optional."""
