"""What a training stage is, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Target = Literal["in_proj", "x_proj", "dt_proj", "out_proj"]


@dataclass(frozen=True)
class LoraConfig:
    """Which projections of the language model get a change of low rank. The rest of it is frozen."""

    rank: int = 16
    alpha: float = 32.0
    """The change is multiplied by `alpha / rank`."""
    dropout: float = 0.0
    """Of the input of the change. In Mamba-2's `out_proj` it costs the memory that `use_mem_eff_path` saves. The change
    of `dt_proj` is one of its weight, and has none."""
    targets: tuple[Target, ...] = ("in_proj", "out_proj")
    """Mamba-1 has `x_proj` and `dt_proj` too."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank of LoRA must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha of LoRA must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout of LoRA must lie in [0, 1), got {self.dropout}")
        if not self.targets or not set(self.targets) <= set(get_args(Target)):
            raise ValueError(f"targets of LoRA must be some of {', '.join(get_args(Target))}; got {self.targets}")


@dataclass(frozen=True)
class StageConfig:
    """One stage: which parts of the model learn, and how."""

    name: str
    trainable: tuple[str, ...]
    """Beginnings of the names of the parameters that learn; the others are frozen. An empty text is all of them."""
    lr: float
    epochs: float = 1.0
    batch_size: int = 64
    """Samples a step."""
    micro_batch_size: int | None = None
    """Samples that a rank runs at once; the gradients of a step's micro batches are added up. None is all it has."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_ratio: float = 0.03
    """Part of the steps over which the learning rate rises; it then falls to zero along a cosine."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    max_loss: float = 25.0
    """A larger loss stops the stage, as one that is not a number does. To guess among 50,000 tokens costs 11."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs matrix products in bfloat16 (autocast); weights and scans stay float32."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of each block for the backward, which computes the rest again."""
    context_parallel: int = 1
    """Ranks that split each batch along its tokens, where these are too many for one; it divides their number."""
    seed: int = 0
    save_every: int = 200
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept."""
    workers: int = 0
    """Processes that prepare data ahead of the loop; 0 prepares it in the loop. The result is the same."""
    max_broken: float = 0.0
    """Share of the samples that may be broken, and are then replaced and reported. At 0 the first is an error."""
    lora: LoraConfig | None = None
    """Of the language model only changes of low rank learn, and are merged in the end; None lets it learn whole."""

    def __post_init__(self) -> None:
        positive = ("lr", "epochs", "batch_size", "grad_clip", "max_loss", "save_every", "keep_last")
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} of stage {self.name!r} must be positive, got {getattr(self, name)}")
        if self.context_parallel < 1:
            raise ValueError(f"context_parallel must be at least 1, got {self.context_parallel}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1 or None, got {self.micro_batch_size}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1], got {self.warmup_ratio}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.workers < 0:
            raise ValueError(f"workers of stage {self.name!r} must not be negative, got {self.workers}")
        if not 0 <= self.max_broken < 1:
            raise ValueError(f"max_broken of stage {self.name!r} must lie in [0, 1), got {self.max_broken}")
        if not self.trainable:
            raise ValueError(f"trainable of stage {self.name!r} must name at least one part")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")

    def steps(self, n_samples: int) -> int:
        """Steps of the stage over so many samples."""
        return max(1, round(self.epochs * n_samples / self.batch_size))
