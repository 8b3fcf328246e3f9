"""Identity of a run: everything that determines the steps of a stage, so that only the same run is resumed."""

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
from .config import RESUME_FREE, Changeable, StageConfig
from .loader import Samples

PROBES = 64
"""Number of samples that are compared, evenly spaced."""


@dataclass(frozen=True)
class Fingerprint:
    """An annotation file or shard, identified by its content."""

    name: str
    n_bytes: int
    sha256: str


def fingerprint(path: Path) -> Fingerprint:
    """Hash an annotation file or shard; a shard's images are part of it."""
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
        model: model at the start of the stage, with all of its weights.
        stage: settings of the stage.
        samples: the training set.
        data: fingerprints of the files that `samples` are read from.

    Returns:
        Names to values: the settings of the stage that affect its steps; hashes of the weights, the data and some
        prepared samples; for a VLM its config and template.
    """
    # Keys are shown in the error of a resume that differs, so they are worded for users.
    run: dict[str, Any] = {"weights": weights_hash(model)}
    if isinstance(model, VLM):
        run["config"] = _sha256(json.dumps(to_json_dict(model.config)))
        run["template"] = model.template.user("QUESTION", True) + model.template.answer("ANSWER")
    run["data"] = [f"{f.name} (sha256 {f.sha256})" for f in data]
    run["number of samples"] = len(samples)
    run["prepared samples"] = _probes(samples)
    # Settings that do not affect the steps may differ on resume.
    settings = to_json_dict(stage)
    return run | {name: value for name, value in settings.items() if name not in RESUME_FREE}


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Compare two identities.

    Returns:
        Names that differ, each with both values as text.
    """
    found = {}
    for name in dict.fromkeys([*stored, *now]):
        old, new = stored.get(name), now.get(name)
        if name == "data":
            # Names of files may change, their content and order may not.
            is_same = _contents(old) == _contents(new)
        elif name == "prepared samples":
            # Samples that could not be read then, or cannot be now, are not compared.
            both = [(o, n) for o, n in zip(old or [], new or [], strict=False) if o is not None and n is not None]
            is_same = all(o == n for o, n in both)
            changed = sum(o != n for o, n in both)
            old, new = f"{len(both)} compared", f"{changed} of them differ (images, tokenizer or processing)"
        else:
            is_same = old == new
        if not is_same:
            found[name] = f"{_short(old)} in the checkpoint, {_short(new)} now"
    return found


def check_changeable(names: Sequence[str]) -> None:
    """Check names of settings that a resume is to change.

    Raises:
        ValueError: a name is not in `Changeable`.
    """
    unknown = set(names) - set(get_args(Changeable))
    if unknown:
        raise ValueError(f"may_change must be some of {', '.join(get_args(Changeable))}; got {', '.join(unknown)}")


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of a model's weights."""

    def digest(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        return _sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}", _bytes(tensor))

    with ThreadPoolExecutor() as threads:  # hashlib releases the GIL
        return _sha256(*threads.map(digest, model.state_dict().items()))


def _probes(samples: Samples) -> list[str | None]:
    """Hash some prepared samples; None stands for a broken one."""
    found: list[str | None] = []
    n = min(PROBES, len(samples))
    # Samples may draw random numbers, for augmentation: from a fixed seed, and not from the caller's generator.
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
    # The type first, so that a tuple and a list, or 1 and True, differ.
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
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


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
