"""Checkpoints of a stage: what it has learned, the optimizer, the random state and the step."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..model.hub import replacing_folder
from ..model.weights import WEIGHTS, open_weights

logger = logging.getLogger("vlmamba.train")


def save_checkpoint(
    folder: Path, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, keep_last: int
) -> None:
    """Save `folder/step-N`, then delete all but the newest few.

    Only the parameters that learn are kept: the others are those the stage began with.

    Raises:
        OSError: it could not be written; the checkpoints before are as they were.
    """
    with replacing_folder(folder / f"step-{step:08d}") as staged:
        save_file({n: p.detach().contiguous() for n, p in parameters.items()}, staged / WEIGHTS)
        state = {"step": step, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        torch.save(state, staged / "optimizer.pt")
    for old in _steps(folder)[:-keep_last]:
        shutil.rmtree(old)


def load_newest(folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest checkpoint that is whole, and give its step; 0 where there is none.

    A checkpoint that is damaged is left out with a warning.

    Raises:
        ValueError: a whole checkpoint belongs to another model; every name that does not fit is listed.
    """
    for path in reversed(_steps(folder)):
        try:
            weights = open_weights(path / WEIGHTS)
            state = torch.load(path / "optimizer.pt", weights_only=True)
        except Exception as e:  # torch.load raises many kinds for a damaged file
            logger.warning("checkpoint %s is damaged (%s); trying the one before it", path, e)
            continue
        problems = [f"missing: {n}" for n in parameters if n not in weights]
        problems += [f"unexpected: {n}" for n in weights if n not in parameters]
        problems += [
            f"shape of {n}: {tuple(weights[n].shape)} in the checkpoint, {tuple(p.shape)} in the model"
            for n, p in parameters.items()
            if n in weights and weights[n].shape != p.shape
        ]
        if problems:
            raise ValueError(f"checkpoint {path} is of another model or stage:\n  " + "\n  ".join(problems))
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(weights[name])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        return state["step"]
    return 0


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
