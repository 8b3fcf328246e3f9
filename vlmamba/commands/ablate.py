"""`vlmamba ablate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..model.fields import Count, Interval
from .options import DemoPreset


@dataclass
class Ablate:
    """Compare connectors and scans on easy-VQA, each with the same seeds; print and plot the table."""

    family: Literal["vl-mamba", "ml-mamba"] = "vl-mamba"
    seeds: Annotated[int, Interval("[1, 1000]")] = 3
    """Number of seeds."""
    preset: DemoPreset = "quick"
    shorten: Annotated[float, Interval("(0, inf)")] = 1.0
    """Divisor of the preset's number of epochs."""
    questions: Count = 2000
    """Number of test questions."""
    output: Path | None = None
    """Folder of the run; runs/ablate-FAMILY by default. The same command resumes an interrupted run."""
    device: str = "cpu"

    def run(self) -> None:
        from ..model.device import device_named
        from ..train.ablate import run_ablation
        from ..train.lock import only_run_in
        from ..train.recipes import DEMOS

        recipe = DEMOS[self.preset].faster(self.shorten)
        folder = self.output or Path("runs") / f"ablate-{self.family}"
        device = str(device_named(self.device))
        with only_run_in(folder):
            run_ablation(self.family, recipe, folder, range(self.seeds), self.questions, device)
