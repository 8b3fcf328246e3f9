"""Plan of a stage before it starts: parameters, memory, steps, tokens and FLOPs."""

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
from ..model.quantize import Quantization, choose_bits, replace_matrices
from ..model.vlm import VLM
from .config import StageConfig
from .lora import add_lora
from .optim import freeze_all_but


class RoughTokenizer:
    """Stand-in for a tokenizer that is not on this machine: four characters a token, about right for English."""

    longest_token = 4

    def encode(self, text: str) -> list[int]:
        return [0] * math.ceil(len(text) / 4)


@dataclass(frozen=True)
class SampleSize:
    """Mean size of a sample, over `n_seen` samples."""

    n_seen: int
    tokens: float
    """Tokens of text and image."""
    targets: float
    """Target tokens."""
    views: float
    """Images, each tile of one counted: what the encoders see."""


def measure(samples: Any, n: int = 256) -> SampleSize:
    """Measure `n` samples, evenly spaced. Their images are read, so that broken ones are found.

    Raises:
        ValueError, OSError: a sample is broken, or there is none.
    """
    if not len(samples):
        raise ValueError("there are no records to train on")
    n = min(n, len(samples))
    seen: list[Sample] = [samples[i * len(samples) // n] for i in range(n)]
    views = sum(image.n_views for sample in seen for image in sample.images)
    targets = sum(collate([s]).n_targets for s in seen)
    return SampleSize(n, sum(len(s.input_ids) for s in seen) / n, targets / n, views / n)


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one device during training.

    D is the model width, E the inner width, N the state size, R the rank of dt, H the number of heads, P the width of
    in_proj, V the rows of the embedding, and w the bytes of an activation (2 in bf16, else 4). Weights, gradients and
    each of AdamW's two moments are 4 bytes a parameter. Saved for backward, a token and layer:

    - Mamba: `8 D + w (D + P + E + R + 2N) + 16 E + 4 E N / 64`;
    - Mamba-2: `8 D + w (D + P + E) + 4 H + 4 E N / 256`;
    - with gradient checkpointing: `4 D + w D`, and the above for one layer.

    A target token takes `(12 + w) V` for its logits, an image token `w` bytes for each input and output of the
    connector's linear layers. Frozen encoders save nothing. The layers' formulas were fitted on the PyTorch backend on
    a CPU (within 15 %); kernels on a GPU save less. Library buffers and fragmentation are not counted.
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
    """Parameters, memory, steps, tokens and FLOPs of a stage."""

    stage: StageConfig
    parameters: dict[str, tuple[int, int]]
    """Numbers of trainable and frozen parameters of each part."""
    memory: Memory
    devices: int
    n_samples: int
    size: SampleSize
    flops_per_token: float
    """FLOPs of training, forward and backward, in the mean over tokens of text and image."""
    disk: int
    """Bytes of the checkpoints and the trained model."""

    @property
    def n_steps(self) -> int:
        return self.stage.steps(self.n_samples)

    @property
    def tokens_an_epoch(self) -> float:
        return self.n_samples * self.size.tokens

    def __str__(self) -> str:
        m, size, stage = self.memory, self.size, self.stage
        rows = []
        for part, (trainable, frozen) in self.parameters.items():
            counts = [f"{n:,} {what}" for n, what in ((trainable, "trainable"), (frozen, "frozen")) if n]
            rows.append((part, ", ".join(counts)))
        shares = self.devices // stage.context_parallel
        micro = stage.micro_batch_size or stage.batch_size // shares
        epochs = f"{stage.epochs:g} epoch{'s' * (stage.epochs != 1)}"
        split = f", each batch split over {stage.context_parallel}" * (stage.context_parallel > 1)
        rows += [
            (
                "memory per device",
                f"{mebibytes(m.total)}: weights {mebibytes(m.weights)}, gradients {mebibytes(m.gradients)}, "
                f"optimizer {mebibytes(m.optimizer)}, activations {mebibytes(m.activations)} (estimated)",
            ),
            (
                "batch",
                f"{stage.batch_size} samples: {self.devices} device{'s' * (self.devices > 1)}{split}, "
                f"micro batches of {micro}, {math.ceil(stage.batch_size / shares / micro)} per device",
            ),
            ("steps", f"{self.n_steps:,} ({epochs} of {self.n_samples:,} samples)"),
            (
                "tokens per epoch",
                f"{self.tokens_an_epoch:,.0f}, {size.targets / size.tokens:.0%} of them targets "
                f"(measured on {size.n_seen:,} of {self.n_samples:,} samples)",
            ),
            ("FLOPs", f"{self.flops_per_token * self.tokens_an_epoch * stage.epochs:.3g} in total"),
            ("disk", mebibytes(self.disk)),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join([f"stage {stage.name}", *(f"  {label:<{width}}  {value}" for label, value in rows)])


def make_plan(
    config: VLMConfig,
    stage: StageConfig,
    n_samples: int,
    size: SampleSize,
    devices: int = 1,
    quantize: Quantization | None = None,
) -> Plan:
    """Plan a stage of a model, without its weights.

    Args:
        config: config of the model.
        stage: settings of the stage.
        n_samples: size of the training set.
        size: mean size of a sample, from `measure`.
        devices: number of devices that the batch, weights, gradients and moments are sharded over.
        quantize: bits of the frozen matrices, as for `HubModel.from_pretrained`.

    Raises:
        ValueError: as `freeze_all_but`, or the batch cannot be divided among the devices.
    """
    if devices % stage.context_parallel:
        raise ValueError(f"context_parallel must divide the {devices} ranks, got {stage.context_parallel}")
    shares = devices // stage.context_parallel
    if stage.batch_size % shares:
        raise ValueError(f"batch_size must be divisible by the {shares} devices, got {stage.batch_size}")
    # On the meta device: names and shapes are enough for all of the counts.
    with torch.device("meta"):
        model = VLM(config)
    if quantize is not None:
        replace_matrices(model, choose_bits(model, model.quantizable(), quantize, {}, "the model"))
    if stage.lora is not None:
        add_lora(model, stage.lora)
    trainable = freeze_all_but(model, stage.trainable)
    parameters: dict[str, tuple[int, int]] = {}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        n_trainable, n_frozen = parameters.get(part, (0, 0))
        if name in trainable:
            n_trainable += p.numel()
        else:
            n_frozen += p.numel()
        parameters[part] = n_trainable, n_frozen
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trainable_bytes = sum(p.numel() * p.element_size() for p in trainable.values())
    n_trainable = sum(p.numel() for p in trainable.values())
    # Activations are those of one micro batch; gradient accumulation holds no more.
    micro = stage.micro_batch_size or stage.batch_size // shares
    width = 2 if stage.precision == "bf16" else 4
    memory = Memory(
        weights // devices,
        trainable_bytes // devices,
        8 * n_trainable // devices,
        round(micro * _activations(model, size, width, stage.gradient_checkpointing) / stage.context_parallel),
    )
    flops = flops_of_sample(model, size) / size.tokens
    # While a checkpoint is written there is one more than are kept.
    disk = (stage.keep_last + 1) * (trainable_bytes + 8 * n_trainable) + weights
    return Plan(stage, parameters, memory, devices, n_samples, size, flops, disk)


def flops_of_sample(model: VLM, size: SampleSize) -> float:
    """FLOPs of training on a mean sample: the forward of each part, and twice that for its backward.

    A frozen language model has gradients of its activations alone, which is half of a backward. Encoders, which no
    gradient passes, have no backward. Of the connector the linear layers are counted.
    """
    language, image_tokens = model.config.language, size.views * model.image_tokens
    weights = [(p.numel(), p.requires_grad) for p in model.language_model.parameters()]
    # In units of the forward: 1, 1 for gradients of activations, 1 for those of weights, as far as they are trainable.
    passes = 2 + sum(n for n, is_trainable in weights if is_trainable) / sum(n for n, _ in weights)
    head = 2 * language.d_model * language.padded_vocab_size
    # The head runs on target tokens alone.
    lm = flops_per_token(language, prefill=True).total * size.tokens + head * size.targets
    vision = size.views * sum(_encoder_flops(v) for v in model.config.vision)
    connector = 3 * image_tokens * sum(2 * m.weight.numel() for m in _linears(model.connector))
    return passes * lm + vision + connector


def disk_problem(folder: Path, plans: Sequence[Plan]) -> str | None:
    """Error message if the disk lacks space for the stages; None if it has enough."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    needed, free = max(p.disk for p in plans), shutil.disk_usage(existing).free
    if needed <= free:
        return None
    return f"{folder}: checkpoints and model take {mebibytes(needed)}, but the disk has {mebibytes(free)} left"


def _activations(model: VLM, size: SampleSize, width: int, checkpointed: bool) -> float:
    """Bytes saved for the backward of a mean sample; the formulas are in `Memory`."""
    language = model.config.language
    # With gradient checkpointing every layer saves its inputs, and one at a time is recomputed in full.
    layer, between = _layer_bytes(language, width), (4 + width) * language.d_model
    layers = language.n_layer * between + layer if checkpointed else language.n_layer * layer
    connector = sum(width * (m.in_features + m.out_features) for m in _linears(model.connector))
    # Logits in the activation dtype, in float32, their softmax and its gradient.
    logits = (12 + width) * language.padded_vocab_size
    return size.tokens * layers + size.views * model.image_tokens * connector + size.targets * logits


def _layer_bytes(config: LMConfig, width: int) -> float:
    # For the PyTorch backend; compiled CPU kernels save less. Terms in the order of the formulas in `Memory`; tensors
    # of `width` bytes are activations, of 4 bytes float32.
    d, inner, state = config.d_model, config.expand * config.d_model, config.d_state
    if config.layer == "mamba":
        rank = math.ceil(d / 16) if config.dt_rank is None else config.dt_rank
        # norm output and residual, inputs of the projections (in_proj has 2 E), the scan's float32 inputs, checkpoints
        # of its state every 64 steps
        return 4 * d + width * (d + 3 * inner + rank + 2 * state) + 16 * inner + 4 * inner * state / 64
    heads = inner // config.headdim
    # in_proj has z, x, B and C, and dt
    projection = 2 * inner + 2 * config.ngroups * state + heads
    return 4 * d + width * (d + projection + inner) + 4 * heads + 4 * inner * state / 256


def _encoder_flops(vision: VisionConfig) -> int:
    """FLOPs of an image: four projections and two of the MLP a token, and the attention between all tokens."""
    c = vision.encoder
    tokens = c.grid_size**2
    # 2 FLOPs a weight and token: 4 W^2 of attention projections, 2 W M of the MLP; QK^T and AV are 2 T W each.
    return c.depth * tokens * (8 * c.width**2 + 4 * c.width * c.mlp_width + 4 * tokens * c.width)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]
