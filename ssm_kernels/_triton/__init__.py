"""Triton infrastructure shared by the kernels of several ops."""
