"""Identity of a run: everything that decides which steps a stage takes, so that only the same run is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..model.config_io import to_json_dict
from ..model.vlm import VLM
from .config import FREE, Changeable, StageConfig
from .loader import Samples

PROBES = 64
"""Samples that are looked at, evenly spread."""


@dataclass(frozen=True)
class Fingerprint:
    """A file of annotations, told apart by its content."""

    name: str
    n_bytes: int
    sha256: str


def fingerprint(path: Path) -> Fingerprint:
    """Read a file of annotations whole; a shard holds its images too."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return Fingerprint(path.name, file.tell(), digest.hexdigest())


def run_identity(
    model: nn.Module, stage: StageConfig, samples: Samples, data: Sequence[Fingerprint] = ()
) -> dict[str, Any]:
    """Describe a run as JSON.

    Args:
        model: as it is before the stage begins, with all of its weights.
        data: the files that `samples` are read from.

    Returns:
        Names to values: the settings of the stage that change its steps; hashes of the weights, the data and some
        prepared samples; for a VLM its config and template.
    """
    run: dict[str, Any] = {"weights": weights_hash(model)}
    if isinstance(model, VLM):
        run["config"] = _sha256(json.dumps(to_json_dict(model.config)))
        run["template"] = model.template.user("QUESTION", True) + model.template.answer("ANSWER")
    run["data"] = [f"{f.name} (sha256 {f.sha256})" for f in data]
    run["number of samples"] = len(samples)
    run["prepared samples"] = _probes(samples)
    settings = to_json_dict(stage)
    return run | {name: value for name, value in settings.items() if name not in FREE}


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Compare two identities; what differs is named with both values."""
    found = {}
    for name in dict.fromkeys([*stored, *now]):
        old, new = stored.get(name), now.get(name)
        if name == "data":
            is_same = _contents(old) == _contents(new)
        elif name == "prepared samples":
            # A sample that could not be read then or cannot now tells nothing.
            both = [(o, n) for o, n in zip(old or [], new or [], strict=False) if o is not None and n is not None]
            is_same = all(o == n for o, n in both)
            changed = sum(o != n for o, n in both)
            old, new = f"{len(both)} looked at", f"{changed} of them are others (images, tokenizer or processing)"
        else:
            is_same = old == new
        if not is_same:
            found[name] = f"{_short(old)} in the checkpoint, {_short(new)} now"
    return found


def check_changeable(names: Sequence[str]) -> None:
    """Refuse names of settings that no resume may change.

    Raises:
        ValueError: a name is none of `Changeable`.
    """
    unknown = set(names) - set(get_args(Changeable))
    if unknown:
        raise ValueError(f"may_change must be some of {', '.join(get_args(Changeable))}; got {', '.join(unknown)}")


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of a model's weights."""

    def digest(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        return _sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}", _bytes(tensor))

    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        return _sha256(*threads.map(digest, model.state_dict().items()))


def _probes(samples: Samples) -> list[str | None]:
    """Hashes of some prepared samples; None for one that is broken."""
    found: list[str | None] = []
    n = min(PROBES, len(samples))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for i in range(n):
            digest = hashlib.sha256()
            try:
                _update(digest, samples[i * len(samples) // n])
                found.append(digest.hexdigest()[:16])
            except (ValueError, OSError):
                found.append(None)
    return found


def _update(digest: Any, value: object) -> None:
    """Add a sample to a hash: tensors and plain values in tuples, lists, dicts and dataclasses."""
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _update(digest, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _update(digest, key)
            _update(digest, inner)
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for inner in value:
            _update(digest, inner)
    elif value is None or isinstance(value, str | bytes | int | float | bool):
        digest.update(repr(value).encode())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _sha256(*parts: str | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _contents(files: Sequence[str] | None) -> list[str]:
    return [f.rsplit("sha256 ", 1)[-1] for f in files or []]


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else repr(value) if "\n" in str(value) else str(value)
    return text if len(text) <= 300 else text[:300] + "…"
