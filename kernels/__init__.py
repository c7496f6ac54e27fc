"""Triton kernels, imported as ``fastkd.kernels``; each module holds those of one op."""
