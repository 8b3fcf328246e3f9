"""Handwritten kernels in PTX for the emulator."""

from __future__ import annotations

import functools

import torch

from vlmamba.benchmarks.ptx import machine
from vlmamba.benchmarks.ptx.memory import allocations_of
from vlmamba.benchmarks.ptx.parser import parse
from vlmamba.benchmarks.ptx.translate import translate

HEADER = """.version 8.7
.target sm_100a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u32 k_param_1) .reqntid {threads}
{{
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .b64 %rd<9>;
  ld.param.b64 %rd1, [k_param_0];
  ld.param.b32 %r1, [k_param_1];
  mov.u32 %r2, %tid.x;
  mul.wide.u32 %rd2, %r2, 4;
  add.s64 %rd3, %rd1, %rd2;
  shl.b32 %r3, %r2, 2;
{body}
  ret;
}}
"""


def run_ptx(body: str, out: torch.Tensor, *, threads: int = 64, number: int = 0, grid: int = 1, shared: int = 1024):
    """Run a handwritten kernel on one tensor: %rd3 is the address of this thread's element, %r3 its byte offset."""
    kernel = parse(HEADER.format(threads=threads, body=body))
    found, counts, diverged = machine.run(
        functools.partial(translate, kernel, threads), kernel, threads // 32, shared, 2,
        allocations_of([("out", out)]), [out.data_ptr(), number], (grid, 1, 1), checks=True, seed=0,
    )  # fmt: skip
    return dict(found), counts, diverged
