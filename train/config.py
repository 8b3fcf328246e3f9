"""What a training stage is, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from ..model.fields import Count, Interval, Seed, Size, check_fields

Target = Literal["in_proj", "x_proj", "dt_proj", "out_proj"]
Changeable = Literal["lr", "epochs", "weight_decay", "betas", "warmup_ratio", "grad_clip", "precision"]
"""Settings that a resume may change where it is told so. Batch size and seed are none: they decide which samples have
been seen."""
FREE = (
    "micro_batch_size", "gradient_checkpointing", "context_parallel", "workers", "save_every", "keep_last", "max_loss",
    "max_broken",
)  # fmt: skip
"""Settings that may differ at a resume: the steps stay the same, to rounding."""


@dataclass(frozen=True)
class LoraConfig:
    """Which projections of the language model get a change of low rank. The rest of it is frozen."""

    rank: Size = 16
    alpha: Annotated[float, Interval("(0, inf)")] = 32.0
    """The change is multiplied by `alpha / rank`."""
    dropout: Annotated[float, Interval("[0, 1)")] = 0.0
    """Of the input of the change."""
    targets: tuple[Target, ...] = ("in_proj", "out_proj")
    """Mamba-1 has `x_proj` and `dt_proj` too."""

    def __post_init__(self) -> None:
        check_fields(self, lambda name: f"{name} of LoRA")
        if not self.targets:
            raise ValueError(f"targets of LoRA must be some of {', '.join(get_args(Target))}; got none")


@dataclass(frozen=True)
class StageConfig:
    """One stage: which parts of the model learn, and how."""

    name: str
    trainable: tuple[str, ...]
    """Beginnings of the names of the parameters that learn; the others are frozen. An empty text is all of them."""
    lr: Annotated[float, Interval("(0, 1000000]")]
    epochs: Annotated[float, Interval("(0, 1000000]")] = 1.0
    batch_size: Size = 64
    """Samples a step."""
    micro_batch_size: Size | None = None
    """Samples that a rank runs at once; the gradients of a step's micro batches are added up. None is all it has."""
    weight_decay: Annotated[float, Interval("[0, inf)")] = 0.0
    betas: tuple[Annotated[float, Interval("[0, 1)")], Annotated[float, Interval("[0, 1)")]] = (0.9, 0.999)
    warmup_ratio: Annotated[float, Interval("[0, 1]")] = 0.03
    """Part of the steps over which the learning rate rises; it then falls to zero along a cosine."""
    grad_clip: Annotated[float, Interval("(0, inf]")] = 1.0
    """Largest norm of the gradient."""
    max_loss: Annotated[float, Interval("(0, inf]")] = 25.0
    """A larger loss stops the stage, as one that is not a number does. To guess among 50,000 tokens costs 11."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs matrix products in bfloat16 (autocast); weights and scans stay float32."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of each block for the backward, which computes the rest again."""
    context_parallel: Count = 1
    """Ranks that split each batch along its tokens, where these are too many for one; it divides their number."""
    seed: Seed = 0
    save_every: Count = 200
    """Steps between checkpoints."""
    keep_last: Count = 2
    """Checkpoints kept."""
    workers: Annotated[int, Interval("[0, 1024]")] = 0
    """Processes that prepare data ahead of the loop; 0 prepares it in the loop. The result is the same."""
    max_broken: Annotated[float, Interval("[0, 1)")] = 0.0
    """Share of the samples that may be broken, and are then replaced and reported. At 0 the first is an error."""
    lora: LoraConfig | None = None
    """Of the language model only changes of low rank learn, and are merged in the end; None lets it learn whole."""

    def __post_init__(self) -> None:
        check_fields(self, lambda name: f"{name} of stage {self.name!r}")
        if not self.trainable:
            raise ValueError(f"trainable of stage {self.name!r} must name at least one part")

    def steps(self, n_samples: int) -> int:
        """Steps of the stage over so many samples."""
        return max(1, round(self.epochs * n_samples / self.batch_size))
