"""Layouts of published checkpoints, and their detection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import text_files
from ..config_io import MODEL_TYPES

FORMATS = {
    "own": "config.json as this library writes it",
    "state-spaces": "config.json with d_model, n_layer and ssm_cfg",
    "transformers": "config.json with another model_type than this library's",
    "mistral": "params.json with dim, n_layers and n_groups",
    "timm": "config.json with architecture and pretrained_cfg",
    "ml-mamba": "latest-checkpoint.pt, and a config.json with llm_backbone_id mamba2-* or none",
    "cobra": "latest-checkpoint.pt, and a config.json with another llm_backbone_id",
}
"""Formats, and what each is detected by."""

RELEASED = "latest-checkpoint.pt"
"""Weights file of ML-Mamba and Cobra, in the folder or in its `checkpoints`."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or not an object; the message names it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, so what model it holds is unknown")
    data = text_files.read_json(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold an object with named values, got {type(data).__name__}")
    return data


@contextlib.contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Convert errors of malformed settings in a file into a ValueError that names the file.

    Such files have dozens of settings in several spellings. One of another type, or of an impossible size, only shows
    where it is used.

    Raises:
        ValueError: from the block; or in place of a TypeError and the like.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError) as e:
        raise ValueError(f"{path} has a setting that no model has: {type(e).__name__}: {e}") from e


def detect_format(folder: str | Path) -> str:
    """Detect the format of a checkpoint from its small files.

    Args:
        folder: of the checkpoint.

    Returns:
        A key of `FORMATS`.

    Raises:
        FileNotFoundError: there is no config.
        ValueError: it is of no known format; the message has what was found and what is known.
    """
    folder = checkpoint_folder(folder)
    # ML-Mamba's repository has no config.
    if not (folder / "config.json").exists() and (folder / RELEASED).exists():
        return "ml-mamba"
    if not (folder / "config.json").exists() and (folder / "params.json").exists():
        # Mistral's transformers have a params.json too, without n_groups.
        keys = read_json(folder / "params.json").keys()
        if {"dim", "n_layers", "n_groups"} <= keys:
            return "mistral"
        raise _unknown(folder / "params.json", keys)
    data = read_json(folder / "config.json")
    keys = data.keys()
    # From the most specific to the least: own configs share keys with the others.
    if "model_type" in keys:
        return "own" if data["model_type"] in MODEL_TYPES else "transformers"
    if "architecture" in keys and ("pretrained_cfg" in keys or "num_features" in keys):
        return "timm"
    if {"d_model", "n_layer", "ssm_cfg"} <= keys:
        return "state-spaces"
    if (folder / RELEASED).exists() or (folder / "checkpoints" / RELEASED).exists() or "model" in keys:
        # Cobra nests the settings of the model among those of its training run.
        settings = data["model"] if isinstance(data.get("model"), dict) else data
        if "llm_backbone_id" in settings:
            return "ml-mamba" if str(settings["llm_backbone_id"]).startswith("mamba2") else "cobra"
    if {"d_model", "n_layer"} <= keys or "language" in keys or {"patch_size", "width", "depth"} <= keys:
        return "own"
    raise _unknown(folder / "config.json", keys)


def checkpoint_folder(folder: str | Path) -> Path:
    """Return the folder, or the one inside it with a `config.json` where it has none itself, as in `han1997/cobra`.

    Raises:
        ValueError: there are several.
    """
    folder = Path(folder)
    if any((folder / name).exists() for name in ("config.json", "params.json", RELEASED)):
        return folder
    # Cobra's repository has one folder per model.
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if len(inner) > 1:
        raise ValueError(f"{folder} holds several models: give the folder of one, as {inner[0]}")
    return inner[0] if inner else folder


def _unknown(path: Path, keys: Iterable[str]) -> ValueError:
    known = "\n  ".join(f"{name}: {mark}" for name, mark in FORMATS.items())
    seen = ", ".join(sorted(keys)) or "nothing"
    return ValueError(f"{path} is of no known format: it has {seen}. Known are\n  {known}")
