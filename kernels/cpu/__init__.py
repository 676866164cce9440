"""Kernels for CPUs, compiled by numba and LLVM; the operations in the folder above call them."""
