"""Types of options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import tyro

from ..model.generation.config import GenerationConfig

Positional = tyro.conf.Positional
DemoPreset = Literal["quick", "full"]
DtypeName = Literal["fp32", "bf16", "fp16"]
Unset = tyro.conf.arg(help_behavior_hint="")
"""An option without a default to show."""
Sampling: TypeAlias = Annotated[GenerationConfig, tyro.conf.arg(name="")]
"""Options of generation, without a prefix."""
