"""Model card of a trained model: recipe, data, versions and final metrics, for the Hub."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.config_io import to_json_dict
from ..model.files import write_atomic
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


def write_card(folder: Path, base: str, recipe: str, stages: Sequence[TrainedStage], template: str) -> None:
    """Write `README.md` into the folder of a saved model.

    Args:
        folder: folder of the model.
        base: folder, name or preset of the model that training started from.
        recipe: name of the recipe.
        stages: finished stages, in order.
        template: name of the model's prompt template.
    """
    # The Hub reads the YAML front matter for tags and search.
    parts = [_front_matter(base), _usage(folder.name, base, recipe, template)]
    for trained in stages:
        parts.append(_stage(trained))
    parts.append("## Made with\n\n" + _table({"": "version", **versions()}))
    write_atomic(folder / "README.md", "\n\n".join(parts) + "\n")


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


def _front_matter(base: str) -> str:
    # The Hub takes `base_model` for one of its names, so a local folder is left out.
    on_hub = not Path(base).exists() and base.count("/") == 1
    lines = ["library_name: vl-mamba", "pipeline_tag: image-text-to-text", "tags:", "- mamba", "- vision-language"]
    return "\n".join(["---", *lines, *([f"base_model: {base}"] if on_hub else []), "---"])


def _usage(name: str, base: str, recipe: str, template: str) -> str:
    return (
        f"# {name}\n\nTrained from `{base}` by the recipe `{recipe}`; its prompt "
        f"template is `{template}`.\n\n"
        "```python\nfrom vlmamba.model import VLM\n\n"
        'model = VLM.from_pretrained("this folder")\nprint(model.generate(["What is this?"], ["picture.png"]))\n```'
    )


def _stage(trained: TrainedStage) -> str:
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
    return "\n\n".join([f"## Stage {name}", "\n".join(data), _table({"setting": "", **settings}), _table(summary)])


def _table(rows: Mapping[str, Any]) -> str:
    """Format rows of two columns; the first is the header."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
