"""Where a stage's figures go: a JSONL file always, TensorBoard where it is installed, and a progress bar."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

from tqdm import tqdm


class Tracker:
    """Writes the figures of each step. After a resume the curve goes on as if nothing had happened."""

    def __init__(self, folder: Path, name: str, first_step: int, n_steps: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        # Steps that were taken after the checkpoint will be taken, and written, again.
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < first_step]
        path.write_text("".join(kept), encoding="utf-8")
        self.file = open(path, "a", buffering=1, encoding="utf-8")
        self.board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=first_step)
        self.bar = tqdm(total=n_steps, initial=first_step, desc=name, unit="step", dynamic_ncols=True, mininterval=0.5)
        self.tokens, self.since = 0, time.perf_counter()

    def step(self, step: int, n_tokens: int, **figures: float) -> None:
        """Record one step. `figures` are reproducible and go to the file; the speed goes to the bar alone."""
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
        self.tokens += n_tokens
        rate = self.tokens / (time.perf_counter() - self.since)
        self.bar.set_postfix_str(f"loss {figures['loss']:.3f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.file.close()
        self.bar.close()
        if self.board:
            self.board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The figures of every step of a stage."""
    return [json.loads(line) for line in _whole_lines(folder / "metrics.jsonl")]


def _whole_lines(path: Path) -> list[str]:
    """Lines of a file, without a last one that a crash cut short."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
