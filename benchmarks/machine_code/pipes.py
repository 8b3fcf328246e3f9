"""Execution pipes: which one an instruction takes, and for how long.

Rates: CUDA C++ programming guide, "Throughput of Native Arithmetic Instructions". A multiprocessor has four
sub-partitions, each of which starts one warp-instruction a clock; an instruction holds its pipe for 32 lanes over the
pipe's width.
"""

from __future__ import annotations

import re

from .sass import Instruction

PIPES: tuple[str, ...] = (
    "FP32", "ALU", "IMAD", "MUFU", "UNI", "LDG", "STG", "LDS", "STS", "LDL", "STL", "SHFL", "BAR", "WAIT", "TENSOR",
    "OTHER",
)  # fmt: skip
_PIPE_OF = {
    "FP32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2 FSWZADD",
    "IMAD": "IMAD",
    # The exponential unit also converts between integers and floats.
    "MUFU": "MUFU I2F F2I F2F FRND I2I POPC FLO BREV",
    "LDG": "LDG LD LDGSTS ATOMG ATOM", "STG": "STG ST RED REDG", "LDS": "LDS LDSM ATOMS", "STS": "STS STSM",
    "LDL": "LDL", "STL": "STL", "SHFL": "SHFL REDUX MATCH", "BAR": "BAR",
    "WAIT": "DEPBAR LDGDEPBAR WARPGROUP SYNCS MEMBAR FENCE WARPSYNC ERRBAR CGAERRBAR UCGABAR_ARV UCGABAR_WAIT",
    "TENSOR": "HMMA HGMMA IMMA DMMA QGMMA UTCHMMA UTCQMMA UTCIMMA LDTM STTM LDT STT",
    "OTHER": "BRA EXIT BSSY BSYNC BREAK RET CALL BRX JMP YIELD NANOSLEEP BPT LDC WARPGROUPSET VOTE VOTEU ELECT CCTL "
             "DADD DMUL DFMA DSETP ACQBULK PREEXIT",
}  # fmt: skip
_BY_NAME = {name: pipe for pipe, names in _PIPE_OF.items() for name in names.split()}


def pipe_of(instruction: Instruction) -> str:
    """The pipe that an instruction takes, one of `PIPES`; integer and logical work is ALU."""
    base = instruction.base
    if base in _BY_NAME:
        return _BY_NAME[base]
    # The uniform datapath computes once a warp; R2UR and S2UR bring a value there.
    return "UNI" if base.startswith("U") or base in ("R2UR", "S2UR", "LDCU") else "ALU"


def is_wait(instruction: Instruction) -> bool:
    """Whether an instruction waits for asynchronous copies or matrix products."""
    return instruction.name.startswith(("DEPBAR", "WARPGROUP.DEPBAR", "SYNCS.PHASECHK"))


def tensor_clocks(instruction: Instruction) -> float:
    """Clocks of a multiprocessor's tensor cores for one warp's share of a dense product, at 16 bits.

    Hopper multiplies (64, 16) by (16, N) in N / 2 clocks for a warpgroup of four warps; the rate of `HMMA` is half of
    it, as on Ampere.
    """
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.name)
    if instruction.base in ("HGMMA", "QGMMA") and shape:
        m, n, k = (int(s) for s in shape.groups())
        return m * n * k / 2048 / 4
    if instruction.base == "HMMA":
        digits = re.search(r"\.(16816|1688|884)", instruction.name)
        return {"16816": 2048, "1688": 1024, "884": 256}[digits[1]] / 1024 if digits else 2
    return 0.0
