"""What a stage will take, told before it begins: parameters, memory, steps, tokens and operations."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model.batch import Sample, collate
from ..model.config import LMConfig, VisionConfig, VLMConfig
from ..model.inspect import flops_per_token, mebibytes
from ..model.vlm import VLM
from .config import StageConfig
from .lora import add_lora
from .optim import freeze_all_but


class RoughTokenizer:
    """Counts four characters of English as a token, where the real tokenizer is not at hand."""

    longest_token = 4

    def encode(self, text: str) -> list[int]:
        return [0] * math.ceil(len(text) / 4)


@dataclass(frozen=True)
class Size:
    """How large samples are, in the mean over those that were looked at."""

    n_seen: int
    tokens: float
    """Of text and image."""
    targets: float
    """Tokens that are learned."""
    images: float


def measure(samples: Any, n: int = 256) -> Size:
    """Look at so many samples, evenly spread. Their images are read, so that what is broken there shows.

    Raises:
        ValueError, OSError: a sample is broken, or there is none.
    """
    if not len(samples):
        raise ValueError("there are no records to train on")
    n = min(n, len(samples))
    seen: list[Sample] = [samples[i * len(samples) // n] for i in range(n)]
    targets = sum(collate([s]).n_targets for s in seen)
    return Size(n, sum(len(s.input_ids) for s in seen) / n, targets / n, sum(bool(s.images) for s in seen) / n)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device while it trains.

    Letters: D width, E inner width, N state, R rank of dt, H heads, P width of in_proj, V rows of the embedding, and
    w bytes of an activation (2 in bf16, else 4). Weights, gradients and the two moments of AdamW are 4 bytes each.
    What the backward of one token needs, a layer:

    - Mamba: `8 D + w (D + P + E + R + 2N) + 16 E + 4 E N / 64`;
    - Mamba-2: `8 D + w (D + P + E) + 4 H + 4 E N / 256`;
    - with gradient checkpointing by block: `4 D + w D`, and the above for one layer.

    A learned token takes `(12 + w) V` for its logits, an image's token `w` bytes for each input and output of the
    connector's linear layers. Frozen encoders keep nothing. The layers' share was fitted on the CPU's PyTorch path
    (within 15 %); kernels on a GPU keep less. Buffers of libraries and fragmentation are not counted.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Plan:
    """What a stage will take."""

    stage: StageConfig
    parameters: dict[str, tuple[int, int]]
    """Trained and frozen of each part."""
    memory: Memory
    devices: int
    n_samples: int
    size: Size
    flops_per_token: float
    """Of training, forward and backward, in the mean over tokens of text and image."""
    disk: int
    """Bytes that the checkpoints and the trained model will take."""

    @property
    def n_steps(self) -> int:
        return self.stage.steps(self.n_samples)

    @property
    def tokens_an_epoch(self) -> float:
        return self.n_samples * self.size.tokens

    def __str__(self) -> str:
        m, size, stage = self.memory, self.size, self.stage
        rows = []
        for part, (trained, frozen) in self.parameters.items():
            counts = [f"{n:,} {what}" for n, what in ((trained, "trained"), (frozen, "frozen")) if n]
            rows.append((part, ", ".join(counts)))
        shares = self.devices // stage.context_parallel
        micro = stage.micro_batch_size or stage.batch_size // shares
        split = f", each batch over {stage.context_parallel}" * (stage.context_parallel > 1)
        rows += [
            (
                "memory a device",
                f"{mebibytes(m.total)}: weights {mebibytes(m.weights)}, gradients {mebibytes(m.gradients)}, "
                f"optimizer {mebibytes(m.optimizer)}, activations {mebibytes(m.activations)} (estimated)",
            ),
            (
                "batch",
                f"{stage.batch_size} samples: {self.devices} device{'s' * (self.devices > 1)}{split}, "
                f"{micro} at once, {math.ceil(stage.batch_size / shares / micro)} times",
            ),
            ("steps", f"{self.n_steps:,} ({stage.epochs:g} epochs of {self.n_samples:,} samples)"),
            (
                "tokens an epoch",
                f"{self.tokens_an_epoch:,.0f}, {size.targets / size.tokens:.0%} of them learned "
                f"(counted on {size.n_seen:,} of {self.n_samples:,} samples, the rest by their mean)",
            ),
            ("operations", f"{self.flops_per_token * self.tokens_an_epoch * stage.epochs:.3g} in all"),
            ("disk", mebibytes(self.disk)),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join([f"stage {stage.name}", *(f"  {label:<{width}}  {value}" for label, value in rows)])


def make_plan(config: VLMConfig, stage: StageConfig, n_samples: int, size: Size, devices: int = 1) -> Plan:
    """Plan a stage of a model, without its weights.

    Args:
        size: of the samples, from `measure`.
        devices: over which the batch, weights, gradients and moments are spread.

    Raises:
        ValueError: as `freeze_all_but`, or the batch cannot be spread over the devices.
    """
    if devices % stage.context_parallel:
        raise ValueError(f"context_parallel must divide the {devices} ranks, got {stage.context_parallel}")
    shares = devices // stage.context_parallel
    if stage.batch_size % shares:
        raise ValueError(f"batch_size must be divisible by the {shares} devices, got {stage.batch_size}")
    with torch.device("meta"):
        model = VLM(config)
    if stage.lora is not None:
        add_lora(model, stage.lora)
    learning = freeze_all_but(model, stage.trainable)
    parameters: dict[str, tuple[int, int]] = {}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        trained, frozen = parameters.get(part, (0, 0))
        parameters[part] = (trained + p.numel(), frozen) if name in learning else (trained, frozen + p.numel())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained_bytes = sum(p.numel() * p.element_size() for p in learning.values())
    trained = sum(p.numel() for p in learning.values())
    micro = stage.micro_batch_size or stage.batch_size // shares
    width = 2 if stage.precision == "bf16" else 4
    memory = Memory(
        weights // devices,
        trained_bytes // devices,
        8 * trained // devices,
        round(micro * _activations(model, size, width, stage.gradient_checkpointing) / stage.context_parallel),
    )
    flops = flops_of_sample(model, size) / size.tokens
    # Of checkpoints there is one more than are kept while it is written.
    disk = (stage.keep_last + 1) * (trained_bytes + 8 * trained) + weights
    return Plan(stage, parameters, memory, devices, n_samples, size, flops, disk)


def flops_of_sample(model: VLM, size: Size) -> float:
    """Operations of training on a mean sample: the parts' forward, twice that again for the backward.

    A frozen part that gradients pass through is spared the gradients of its weights; the encoders, which none pass,
    their whole backward. Of the connector the linear layers are counted.
    """
    language, image_tokens = model.config.language, size.images * model.image_tokens
    weights = [(p.numel(), p.requires_grad) for p in model.language_model.parameters()]
    times = 2 + sum(n for n, learns in weights if learns) / sum(n for n, _ in weights)
    head = 2 * language.d_model * language.padded_vocab_size
    lm = flops_per_token(language, prefill=True).total * size.tokens + head * size.targets
    vision = size.images * sum(_encoder_flops(v) for v in model.config.vision)
    connector = 3 * image_tokens * sum(2 * m.weight.numel() for m in _linears(model.connector))
    return times * lm + vision + connector


def disk_problem(folder: Path, plans: Sequence[Plan]) -> str | None:
    """What is wrong where the disk is too full for the stages."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    needed, free = max(p.disk for p in plans), shutil.disk_usage(there).free
    if needed <= free:
        return None
    return f"{folder}: checkpoints and model take {mebibytes(needed)}, but the disk has {mebibytes(free)} left"


def _activations(model: VLM, size: Size, width: int, checkpointed: bool) -> float:
    """Bytes that the backward of a mean sample needs."""
    language = model.config.language
    layer, between = _layer_bytes(language, width), (4 + width) * language.d_model
    layers = language.n_layer * between + layer if checkpointed else language.n_layer * layer
    connector = sum(width * (m.in_features + m.out_features) for m in _linears(model.connector))
    logits = (12 + width) * language.padded_vocab_size
    return size.tokens * layers + size.images * model.image_tokens * connector + size.targets * logits


def _layer_bytes(config: LMConfig, width: int) -> float:
    d, inner, state = config.d_model, config.expand * config.d_model, config.d_state
    if config.layer == "mamba":
        rank = math.ceil(d / 16) if config.dt_rank is None else config.dt_rank
        return 4 * d + width * (d + 3 * inner + rank + 2 * state) + 16 * inner + 4 * inner * state / 64
    heads = inner // config.headdim
    projection = 2 * inner + 2 * config.ngroups * state + heads
    return 4 * d + width * (d + projection + inner) + 4 * heads + 4 * inner * state / 256


def _encoder_flops(vision: VisionConfig) -> int:
    """Of an image: four projections and two of the MLP a token, and the attention between all tokens."""
    c = vision.encoder
    tokens = c.grid_size**2
    return c.depth * tokens * (8 * c.width**2 + 4 * c.width * c.mlp_width + 4 * tokens * c.width)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]
