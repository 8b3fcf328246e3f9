"""Figures of the shipped kernels, as the last change left them: `benchmarks/results/machine-code.json`.

A test compares the kernels with them, so that none becomes worse unseen. After a change that makes one better, or that
is worth what it costs, write them anew: `ssm-bench machine-code --json benchmarks/results/machine-code.json`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ..cases import Case, published
from ..devices import MACHINES
from .measure import unit_of

HELD = Path(__file__).parent.parent / "results" / "machine-code.json"
"""A file of `ssm-bench machine-code --json`; a wheel does not contain it."""


@functools.lru_cache(maxsize=1)
def held_results() -> list[dict[str, Any]]:
    """Rows of the file; none where it is not there."""
    return json.loads(HELD.read_text())["results"] if HELD.exists() else []


def issue_seconds(case: Case, mode: str, device: str) -> float | None:
    """Least time of a call of this project's kernels by the instructions that they start.

    Args:
        case: the call, at one of the published sizes.
        mode: `fwd` or `bwd`.
        device: a name of `MACHINES`.

    Returns:
        Seconds, from the instructions a unit of the held case of the op; None where its kernels are not held for the
        device's machine code.
    """
    machine = MACHINES.get(device)
    names = {str(c): c for c in published(case.dtype)}
    for result in held_results():
        held = names.get(result["case"])
        if machine is not None and held is not None and held.op == case.op and result["target"] == machine.target:
            if result["impl"] == "ours" and mode in result["passes"]:
                return result["passes"][mode]["totals"]["instructions"] * unit_of(case).count / machine.slots
    return None
