"""`vlmamba demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .options import DemoPreset


@dataclass
class Demo:
    """Train a tiny VL-Mamba and ML-Mamba on easy-VQA, evaluate, plot. An interrupted run resumes."""

    preset: DemoPreset = "quick"
    """quick: about ten minutes on two cores; full: about an hour."""
    output: Path | None = None
    """Folder of the run; runs/demo-PRESET by default."""
    device: str = "cpu"

    def run(self) -> None:
        from ..model.device import device_named
        from ..train.demo import run_demo
        from ..train.lock import only_run_in
        from ..train.recipes import DEMOS

        folder = self.output or Path("runs") / f"demo-{self.preset}"
        device = str(device_named(self.device))
        with only_run_in(folder):
            run_demo(DEMOS[self.preset], folder, device)
