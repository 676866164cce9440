"""Compiled CPU code of the operations in the folder above, which call it; all of numba and LLVM is in here."""
