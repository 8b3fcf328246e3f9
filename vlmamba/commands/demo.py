"""`vlmamba demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..model.fields import Seed
from .options import DemoPreset


@dataclass
class Demo:
    """Train a tiny VL-Mamba and ML-Mamba on easy-VQA, evaluate, plot. An interrupted run resumes.

    Examples:
    $ vlmamba demo
    $ vlmamba demo --preset full --seed 1
    """

    preset: DemoPreset = "quick"
    """quick: a few minutes on two cores; full: about four times as long."""
    seed: Seed = 0
    """Seed of the weights and of the order of the samples."""
    output: Path | None = None
    """Folder of the run; runs/demo-PRESET by default, with -seed-SEED for others than 0."""
    device: str = "cpu"
    """cpu, cuda, or auto: a GPU where there is one."""

    def run(self) -> None:
        name = f"demo-{self.preset}" + (f"-seed-{self.seed}" if self.seed else "")
        folder = self.output or Path("runs") / name
        # Before the imports and the preparation, which take seconds.
        print(f"two models learn from scratch to answer about images; everything goes to {folder}", flush=True)
        import torch

        from ..model.device import device_named
        from ..train.demo import run_demo
        from ..train.lock import only_run_in
        from ..train.recipes import DEMOS

        device = str(device_named(self.device))
        # OMP_NUM_THREADS is the user's word for the cores that are ours; a GPU trains one model after the other.
        cores = torch.get_num_threads() if device == "cpu" else 1
        with only_run_in(folder):
            run_demo(DEMOS[self.preset].with_seed(self.seed), folder, device, cores)
