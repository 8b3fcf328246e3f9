"""Decoding steps of all layers of a language model by one compiled kernel on a CPU; `fused_step` imports it.

stack.py            the launch
mamba.py, mamba2.py the kernels: all stages of a layer, shared by threads
parts.py            stages that both have
"""
