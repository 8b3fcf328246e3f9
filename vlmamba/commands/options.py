"""Types of options that several commands share."""

from __future__ import annotations

from typing import Literal, TypeAlias

import tyro

from ..model.generation.config import GenerationConfig

Positional = tyro.conf.Positional
DemoPreset = Literal["quick", "full"]
DtypeName = Literal["fp32", "bf16", "fp16"]
Group = tyro.conf.OmitArgPrefixes
"""A group of options, a dataclass, whose options have no prefix."""
Sampling: TypeAlias = Group[GenerationConfig]
