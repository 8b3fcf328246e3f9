"""Machine code of the kernels that a call launches, counted with no GPU: instructions, bytes, and bounds by them.

An op is called on meta tensors, and every launch is recorded (`launches`) and compiled. The machine code is read
(`sass`), the part of it that decides branches is executed for a sample of programs with the launch's own arguments
(`control`), and each basic block counts as often as it ran (`measure`): instructions by pipe (`pipes`), bytes by tensor
(`memory`), and the least time by rates of named devices (`devices`).
"""
