"""Training in the model card: recipe, data, versions and final metrics of each stage."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..model.card import CardFacts, facts_of
from ..model.config_io import to_json_dict
from ..model.formats.vision import VISION_ENCODERS
from ..model.presets import PRESETS, is_preset
from .config import StageConfig
from .identity import Fingerprint
from .track import read_metrics

PACKAGES = ("vl-mamba", "torch", "triton", "numpy", "tokenizers", "safetensors")
LAST = 50
"""Number of final steps that metrics are averaged over."""


@dataclass(frozen=True)
class TrainedStage:
    """A finished stage."""

    stage: StageConfig
    n_records: int
    data: tuple[Fingerprint, ...]
    folder: Path
    """Folder of the stage, with its metrics."""


def card_facts(base: str, recipe: str, stages: Sequence[TrainedStage]) -> CardFacts:
    """Collect what the card of a trained model says besides its config.

    Args:
        base: preset, folder, or name on the Hub of the model that training started from.
        recipe: name of the recipe.
        stages: finished stages, in order.

    Returns:
        Facts for `save_pretrained`: base models and licence of the base, and sections on each stage and on versions.
    """
    inherited = facts_of_base(base)
    start = f"`{base}`" if is_preset(base) or not Path(base).is_dir() else "a saved model"
    sections = [f"## Training\n\nTrained from {start} by the recipe `{recipe}`."]
    sections += [stage_section(trained) for trained in stages]
    sections.append(made_with())
    return replace(inherited, sections=sections)


def facts_of_base(name: str) -> CardFacts:
    """Collect what a trained model takes over from its base: the pretrained parts of a preset, or see `facts_of`."""
    if not is_preset(name):
        return facts_of(name)
    preset = PRESETS[name]
    return CardFacts((preset.language, *(VISION_ENCODERS[encoder].repo for encoder in preset.encoders)))


def made_with() -> str:
    """Section with the versions of Python and the packages."""
    return "## Made with\n\n" + _table({"": "version", **versions()})


def versions() -> dict[str, str]:
    """Versions of Python and the packages, and the commit where the code is a git checkout."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = _commit()
    return found if commit is None else {**found, "commit": commit}


def _commit() -> str | None:
    # A wheel has no commit, only a version.
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + (" with changes" if changes.strip() else "")


def stage_section(trained: TrainedStage) -> str:
    """Section with the data, settings and final metrics of a stage."""
    settings = to_json_dict(trained.stage)
    name = settings.pop("name")
    data = ["| data | bytes | sha256 |", "|---|---|---|"]
    data += [f"| {f.name} | {f.n_bytes:,} | `{f.sha256}` |" for f in trained.data]
    # From the file rather than from memory, since a resumed run has only its own steps in memory.
    metrics = read_metrics(trained.folder)
    last = metrics[-LAST:]
    summary = {
        "result": "",
        "records": f"{trained.n_records:,}",
        "steps": f"{len(metrics):,}",
    }
    if last:  # the file may be missing
        summary |= {
            f"loss, mean of the last {len(last)} steps": f"{sum(m['loss'] for m in last) / len(last):.4f}",
            "gradient norm, likewise": f"{sum(m['grad_norm'] for m in last) / len(last):.4f}",
        }
    return "\n\n".join([f"### Stage {name}", "\n".join(data), _table({"setting": "", **settings}), _table(summary)])


def _table(rows: Mapping[str, Any]) -> str:
    """Format rows of two columns; the first is the header."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
