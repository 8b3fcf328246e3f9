"""Configuration of a training stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from ..model.fields import Count, Interval, Seed, Size, check_fields

Target = Literal["in_proj", "x_proj", "dt_proj", "out_proj"]
Changeable = Literal["lr", "epochs", "weight_decay", "betas", "warmup_ratio", "grad_clip", "precision"]
"""Settings that a resume may change on request. Batch size and seed are not among them: they determine which samples
have been seen."""
RESUME_FREE = (
    "micro_batch_size", "gradient_checkpointing", "context_parallel", "workers", "save_every", "keep_last", "max_loss",
    "max_broken",
)  # fmt: skip
"""Settings that may differ on resume: the steps stay the same, to rounding."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) on projections of the language model, which is frozen otherwise."""

    rank: Size = 16
    alpha: Annotated[float, Interval("(0, inf)")] = 32.0
    """Adapters are scaled by `alpha / rank`."""
    dropout: Annotated[float, Interval("[0, 1)")] = 0.0
    """Dropout of the adapters' input."""
    targets: tuple[Target, ...] = ("in_proj", "out_proj")
    """Projections with an adapter. Mamba-1 has `x_proj` and `dt_proj` too."""

    def __post_init__(self) -> None:
        check_fields(self, lambda name: f"{name} of LoRA")
        if not self.targets:
            raise ValueError(f"targets of LoRA must be some of {', '.join(get_args(Target))}; got none")


# The parts of a stage's config are groups of options of `vlmamba train`.
@dataclass(frozen=True)
class Subject:
    """A stage's name, and what it trains."""

    name: str
    trainable: tuple[str, ...]
    """Prefixes of trainable parameter names; everything else is frozen. An empty prefix is all of them."""


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Optimizer and schedule of a stage."""

    lr: Annotated[float, Interval("(0, 1000000]")]
    """Peak learning rate."""
    epochs: Annotated[float, Interval("(0, 1000000]")] = 1.0
    """Passes over the data; 0.5 is half of it."""
    batch_size: Size = 64
    """Samples per step, over all ranks."""
    weight_decay: Annotated[float, Interval("[0, inf)")] = 0.0
    """AdamW's decay of matrices; other parameters have none."""
    betas: tuple[Annotated[float, Interval("[0, 1)")], Annotated[float, Interval("[0, 1)")]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments."""
    warmup_ratio: Annotated[float, Interval("[0, 1]")] = 0.03
    """Fraction of the steps with linear warm-up; the learning rate then decays to zero along a cosine."""
    grad_clip: Annotated[float, Interval("(0, inf]")] = 1.0
    """Gradient norm to clip to."""
    max_loss: Annotated[float, Interval("(0, inf]")] = 25.0
    """A larger loss stops the stage, as a non-finite one does. Guessing among 50 thousand tokens has a loss of 11."""
    seed: Seed = 0
    """Seed of the order of the samples, and of dropout."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Precision, memory and speed of a stage. None of these changes the steps, except for precision."""

    micro_batch_size: Size | None = None
    """Samples of one forward and backward on a rank; gradients are accumulated over a step. All of a rank's samples
    where it is not given."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs matrix products in bfloat16 (autocast); weights and scans stay float32."""
    gradient_checkpointing: bool = False
    """Save only the inputs of each block for the backward pass and recompute the rest."""
    context_parallel: Count = 1
    """Ranks that split each batch along its tokens; a divisor of the number of ranks."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Preparation of the samples of a stage."""

    workers: Annotated[int, Interval("[0, 1024]")] = 0
    """Worker processes that prepare batches; 0 prepares them in the training loop. Results do not depend on it."""
    max_broken: Annotated[float, Interval("[0, 1)")] = 0.0
    """Fraction of the samples that may be broken; they are replaced and reported. At 0 the first is an error."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Checkpoints of a stage."""

    save_every: Count = 200
    """Steps between checkpoints."""
    keep_last: Count = 2
    """Number of checkpoints to keep."""


# Fields of the last base come first: name and trainable are the two positional ones.
@dataclass(frozen=True)
class StageConfig(Checkpoints, Loading, Execution, Optimization, Subject):
    """One stage: trainable parameters, optimizer, schedule, batch, checkpoints."""

    lora: LoraConfig | None = field(default=None, kw_only=True)
    """Adapters to train in place of the language model's weights; they are merged at the end. None is full training."""

    def __post_init__(self) -> None:
        # Every number is checked against the interval in its annotation.
        check_fields(self, lambda name: f"{name} of stage {self.name!r}")
        if not self.trainable:
            raise ValueError(f"trainable of stage {self.name!r} must have at least one prefix")

    def steps(self, n_samples: int) -> int:
        """Number of steps of the stage over a dataset of `n_samples`."""
        # An epoch need not end with a step: the sampler continues into the next one.
        return max(1, round(self.epochs * n_samples / self.batch_size))
