"""Inspection of checkpoints: architecture, parameters, memory and FLOPs, without reading weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssm_kernels.modules import MixerState

from .config import LMConfig
from .formats import detect_format
from .hub import fetch_model
from .lm import MambaLM
from .load import model_class
from .presets import PRESETS, is_preset
from .quantize import count_weights, replace_matrices, stored_bits
from .vlm import VLM
from .weights import Weights, check_fit, dtype_of


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a language model per token; a multiplication and an addition are two.

    Letters: D width, E = expand * D inner width, N state, R rank of dt or of MIMO, H heads, G groups, K width of the
    convolution, Q chunk, V rows of the embedding. A layer's

    - projections: Mamba `2 (2DE + E(R + 2N) + RE + ED)`, Mamba-2 `2 (D(2E + 2GN + H) + ED)`, Mamba-3 with A angles
      `2 (D(2E + 2RGN + 3H + A) + ED)`;
    - convolution: `2 K` a channel, of which there are E, or E + 2GN in Mamba-2, and none in Mamba-3;
    - scan of Mamba: `7 E N` (dt A, its exponential, the decay, B x, their sum, and two for C h);
    - scan of Mamba-2, decoding: `5 E N` (the same without the first two, which are one number a head);
    - scan of Mamba-2, in prefill, by chunks: `2 Q (G N + E) + 4 E N` (C B^T, its product with x, and the state in and
      out; the entire square of a chunk, as it is computed);
    - scan of Mamba-3, decoding: `(1 + 6 R) E N` (the decay, and for each rank the input before, this one, and C h);
    - scan of Mamba-3, in prefill: that of Mamba-2 with a group a head, R times.

    The head takes `2 D V`; in a prefill it runs on the last token only, and is not counted. Norms, gates and
    activations are left out: about `10 E` a layer. Nothing depends on the length of the sequence.
    """

    projections: int
    convolution: int
    scan: int
    head: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.projections + self.convolution + self.scan + self.head


def flops_per_token(config: LMConfig, prefill: bool) -> Flops:
    """Count the operations of a decoded token, or of one within a long prompt.

    Args:
        config: of the language model.
        prefill: a token of a prompt.

    Returns:
        Operations by part; see `Flops`.
    """
    width, inner, state = config.d_model, config.expand * config.d_model, config.d_state
    # The formulas of `Flops`.
    if config.layer == "mamba":
        rank = math.ceil(width / 16) if config.dt_rank is None else config.dt_rank
        projections = 2 * (2 * width * inner + inner * (rank + 2 * state) + rank * inner + inner * width)
        channels, scan = inner, 7 * inner * state
    elif config.layer == "mamba3":
        rank, heads = config.mimo_rank or 1, inner // config.headdim
        angles = int(state * config.rope_fraction) // 2
        projected = 2 * inner + 2 * rank * config.ngroups * state + 3 * heads + angles
        projections = 2 * (width * projected + inner * width)
        channels, scan = 0, (1 + 6 * rank) * inner * state
        if prefill:
            scan = rank * (2 * config.chunk_size * (heads * state + inner) + 4 * inner * state)
    else:
        shared = config.ngroups * state
        projections = 2 * (width * (2 * inner + 2 * shared + inner // config.headdim) + inner * width)
        channels, scan = inner + 2 * shared, 5 * inner * state
        if prefill:
            scan = 2 * config.chunk_size * (shared + inner) + 4 * inner * state
    layers = config.n_layer
    head = 0 if prefill else 2 * width * config.padded_vocab_size
    return Flops(layers * projections, layers * 2 * config.d_conv * channels, layers * scan, head)


@dataclass(frozen=True)
class Report:
    """Result of `inspect`."""

    name: str
    format: str
    model: str
    """Name of the class that loads it."""
    parameters: dict[str, int]
    """Number of parameters of each module; tied ones are counted once."""
    dtypes: dict[str, int]
    """Number of parameters of each dtype after loading."""
    weight_bytes: int
    state_bytes: int | None
    """Recurrent state of one sequence of any length; None without a language model."""
    decode: Flops | None
    """Per decoded token."""
    prefill: Flops | None
    """Per token of a prompt."""
    image_tokens: int | None
    """Most tokens of an image; None without a vision encoder and a language model."""

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values, with totals added."""
        flops = {
            name: {**vars(f), "total": f.total} if f else None
            for name, f in (("decode", self.decode), ("prefill", self.prefill))
        }
        total = sum(self.parameters.values())
        return {**vars(self), "parameters": {**self.parameters, "total": total}, **flops}

    def __str__(self) -> str:
        rows = [("parameters", f"{sum(self.parameters.values()):,}")]
        rows += [(f"  {part}", f"{n:,}") for part, n in self.parameters.items()]
        rows.append(("weights", f"{mebibytes(self.weight_bytes)} ({', '.join(self.dtypes)})"))
        if self.state_bytes is not None:
            rows.append(("state per sequence", f"{mebibytes(self.state_bytes)}, whatever its length"))
        for name, flops in (("decode", self.decode), ("prefill", self.prefill)):
            if flops is not None:
                shares = ", ".join(f"{part} {n / flops.total:.1%}" for part, n in vars(flops).items() if n)
                rows.append((f"{name}, per token", f"{_flops(flops.total)} ({shares})"))
        if self.image_tokens is not None:
            rows.append(("image", f"{self.image_tokens} tokens"))
        # Two columns.
        width = max(len(label) for label, _ in rows)
        lines = [f"{label:<{width}}  {value}" for label, value in rows]
        return "\n".join([f"{self.name}: {self.model}, format {self.format}", *lines])


def inspect(name_or_path: str | Path, dtype: torch.dtype | None = None, **hub: Any) -> Report:
    """Inspect a checkpoint in any known format. Only names, shapes and dtypes of the weights are read.

    Args:
        name_or_path: a folder; a preset, for which nothing is downloaded; or a repository on the Hub.
        dtype: report sizes for loading in this dtype; None keeps the file's, and is float32 for a preset.
        hub: `revision`, `cache_dir`, `token`, `force_download` and `local_files_only` as for `hub.fetch`.

    Returns:
        The report.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `hub.fetch`.
        ValueError: the format is not known, a file is damaged, or weights and config do not agree.
    """
    if is_preset(name_or_path):
        kind, layout = VLM, "preset"
        with torch.device("meta"):
            model: nn.Module = VLM(PRESETS[str(name_or_path)].config)
        # Meta tensors in place of the weights of a preset, which are not downloaded.
        weights = Weights.from_tensors(model.state_dict())
    else:
        folder = fetch_model(name_or_path, **hub)
        kind, layout = model_class(folder), detect_format(folder)
        config, weights = kind.open_checkpoint(folder, **hub)
        with torch.device("meta"):
            model = kind(config)  # pyright: ignore[reportArgumentType]  config and class belong together
        replace_matrices(model, stored_bits(weights))
    # The same check as loading, so that a report means that the model loads.
    own, tied = check_fit(model, weights, str(name_or_path))
    stored = weights.dtypes
    parameters: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    weight_bytes = 0
    n_weights = count_weights(model)
    # Once per tensor: tied parameters have several names.
    for names in tied.values():
        loaded = dtype_of(names[0], next(stored[n] for n in names if n in stored), dtype)
        tensor = own[names[0]]
        n = n_weights.get(id(tensor), tensor.numel())
        part, label = _part(names[0]), str(loaded).removeprefix("torch.")
        parameters[part] = parameters.get(part, 0) + n
        dtypes[label] = dtypes.get(label, 0) + n
        weight_bytes += tensor.numel() * loaded.itemsize
    lm, prefix = (model.language_model, "language_model.") if isinstance(model, VLM) else (model, "")
    state_bytes = decode = prefill = None
    if isinstance(lm, MambaLM):
        state_bytes = 0
        for i, one in enumerate(lm.new_state(1)):
            mixer = f"{prefix}backbone.layers.{i}.mixer"
            name = f"{mixer}.conv1d.weight" if isinstance(one, MixerState) else f"{mixer}.B_bias"
            # The convolution's state has the dtype of its weight, all others are at least float32.
            inputs = dtype_of(name, stored[name], dtype)
            for part, t in zip(one._fields, one, strict=True):
                kept = inputs if part == "conv" else torch.promote_types(inputs, torch.float32)
                state_bytes += t.numel() * kept.itemsize
        decode, prefill = (flops_per_token(lm.config, prefill=prefill) for prefill in (False, True))
    return Report(
        str(name_or_path),
        layout,
        kind.__name__,
        parameters,
        dtypes,
        weight_bytes,
        state_bytes,
        decode,
        prefill,
        model.preprocess.most_tokens if isinstance(model, VLM) else None,
    )


def mebibytes(n: int) -> str:
    """Format a size in KiB, MiB or GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 2**10:.1f} KiB"


def _flops(n: int) -> str:
    return f"{n / 1e9:.2f} GFLOPs" if n >= 1e9 else f"{n / 1e6:.2f} MFLOPs"


def _part(name: str) -> str:
    """Return the module that a parameter is counted under: one or two levels below its model."""
    for prefix in ("language_model.", "vision.", ""):
        if name.startswith(prefix):
            inner = name.removeprefix(prefix).split(".")
            depth = 2 if inner[0] in ("backbone", "encoders") else 1
            return prefix + ".".join(inner[:depth])
    raise AssertionError(name)
