"""Parts that the compiled CPU kernels share: vectors, functions on them, compilation, and threads.

Everything here but `threads` imports numba, so that it is imported when a kernel first runs.
"""
