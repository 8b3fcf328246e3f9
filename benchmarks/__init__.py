"""Measuring the kernels against their peers."""
