"""Types of options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import tyro

from ..model.generation.config import GenerationConfig

Positional = tyro.conf.Positional
DemoPreset = Literal["quick", "full"]
DtypeName = Literal["fp32", "bf16", "fp16"]
Quantization = Literal["int8", "int4"]
"""Those of `model.quantize`, which imports torch."""
Group = tyro.conf.OmitArgPrefixes
"""A group of options, a dataclass, whose options have no prefix."""
Sampling: TypeAlias = Group[GenerationConfig]


@dataclass(frozen=True)
class Loading:
    """Dtype, quantization and device of the loaded model."""

    dtype: DtypeName | None = None
    """Dtype of the weights; the checkpoint's own by default."""
    quantize: Quantization | None = None
    """Hold the matrices of language model and encoders in 8 or 4 bits, with scales; a model that is saved so needs no
    option."""
    device: str = "auto"
    """auto is a GPU where there is one."""
