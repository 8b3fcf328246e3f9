"""Where a stage's figures go: JSONL always, TensorBoard where it is installed, W&B where asked, and a progress bar."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from ..model.files import continue_json_lines, json_lines
from ..model.generation.config import GenerationConfig
from .distributed import rank
from .records import Record
from .sources import read_image


class Tracker:
    """Writes the figures of each step. After a resume the curves go on as if nothing had happened.

    `metrics.jsonl` has what is reproducible (loss, rate, norm of the gradient), `speeds.jsonl` what is not.

    Args:
        folder: of the stage.
        name: of the stage, for the bar.
        first_step, n_steps: the step that comes next, and how many there are in all.
        flops_per_token: operations of training on one token; with `peak_flops` it gives the utilisation.
        peak_flops: operations a second of all devices together, at the precision that is trained in.
        wandb: project at Weights & Biases; None sends nothing there.

    Raises:
        ModuleNotFoundError: `wandb` is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        first_step: int,
        n_steps: int,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        wandb: str | None = None,
    ):
        self.wandb = None if wandb is None else _start_wandb(wandb, folder, name)
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = _continued(folder / "metrics.jsonl", first_step)
        self.speeds = _continued(folder / "speeds.jsonl", first_step)
        self.board = _board(folder, purge_step=first_step)
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.bar = tqdm(total=n_steps, initial=first_step, desc=name, unit="step", dynamic_ncols=True, mininterval=0.5)
        self.tokens = self.seconds = 0.0

    def step(
        self,
        step: int,
        *,
        n_tokens: int,
        n_samples: int,
        loss: float,
        lr: float,
        grad_norm: float,
        wait: float,
        seconds: float,
    ) -> None:
        """Record one step; the counts are of all ranks.

        Args:
            wait: seconds of `seconds` that the loop waited for data.
            seconds: that the step took in all.
        """
        figures = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        speeds = {
            "tokens_per_second": n_tokens / seconds,
            "samples_per_second": n_samples / seconds,
            "data_wait": wait / seconds,
            "peak_memory": peak_memory(),
        }
        if self.flops_per_token is not None and self.peak_flops is not None:
            speeds["utilisation"] = self.flops_per_token * n_tokens / seconds / self.peak_flops
        self.metrics.write(json.dumps({"step": step, **figures}) + "\n")
        self.speeds.write(json.dumps({"step": step, **speeds}) + "\n")
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
            for name, value in speeds.items():
                self.board.add_scalar(f"speed/{name}", value, step)
        if self.wandb:
            self.wandb.log({**figures, **{f"speed/{n}": v for n, v in speeds.items()}}, step=step)
        self.tokens += n_tokens
        self.seconds += seconds
        self.bar.set_postfix_str(self._line(figures, speeds), refresh=False)
        self.bar.update()

    def _line(self, figures: Mapping[str, float], speeds: Mapping[str, float]) -> str:
        parts = [f"loss {figures['loss']:.3f}", f"{self.tokens / self.seconds:,.0f} tokens/s"]
        if "utilisation" in speeds:
            parts.append(f"{speeds['utilisation']:.0%} of peak")
        if speeds["data_wait"] >= 0.05:
            parts.append(f"{speeds['data_wait']:.0%} waiting for data")
        return ", ".join(parts)

    def close(self) -> None:
        self.metrics.close()
        self.speeds.close()
        self.bar.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


class SampleAnswers:
    """What a model answers to the same questions as it learns: lines of `answers.jsonl`, and text in TensorBoard.

    It is an `on_step` of `train_stage`, to be called on every rank; the first one writes.

    Args:
        records: whose first questions are asked, and whose first answers are the truth.
        every: steps between; the first answers come after so many.
        precision: of the stage.
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[Record],
        every: int,
        precision: Literal["fp32", "bf16"] = "fp32",
        max_new_tokens: int = 32,
    ):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.folder, self.records, self.every, self.precision = folder, list(records), every, precision
        self.config = GenerationConfig(max_new_tokens)

    def __call__(self, step: int, model: nn.Module) -> None:
        if (step + 1) % self.every:
            return
        answers = self._ask(model)
        if rank():
            return
        board = _board(self.folder)
        # A step that is taken again after a resume has its answers written again.
        with _continued(self.folder / "answers.jsonl", step) as file:
            for i, (record, answer) in enumerate(zip(self.records, answers, strict=True)):
                question, truth = (t.text for t in record.turns[:2])
                image = None if record.image is None else str(record.image)
                line = {"step": step, "image": image, "question": question, "truth": truth, "answer": answer}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                if board:
                    board.add_text(f"answer {i}", f"{question}\n\ntruth: {truth}\n\nanswer: {answer}", step)
        if board:
            board.close()

    def _ask(self, model: nn.Module) -> list[str]:
        was_training, shards = model.training, [m for m in model.modules() if isinstance(m, FSDPModule)]
        device = next((p.device.type for p in model.parameters()), "cpu")
        images = [r.image and read_image(r.image) for r in self.records]
        for module in shards:
            module.unshard()  # what is read past a module's forward too
        # Gathered weights do not stay in their place, as a graph would need them to; under autocast there is none.
        half = self.precision == "bf16" or (bool(shards) and device == "cuda")
        model.eval()
        try:
            with torch.autocast(device, torch.bfloat16, enabled=half):
                return model.generate([r.turns[:1] for r in self.records], images, self.config)
        finally:
            model.train(was_training)
            for module in shards:
                module.reshard()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The figures of every step of a stage; a damaged line is told and left out."""
    return [line.value for line in json_lines(folder / "metrics.jsonl") if line.value is not None]


def peak_memory() -> int:
    """Most bytes that were in use at once: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # In KiB, but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _start_wandb(project: str, folder: Path, name: str) -> Any:
    if importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError("wandb is not installed: pip install wandb")
    import wandb

    # One run for one folder, so that a resume goes on in it.
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=f"{folder.parent.name}/{name}", id=run_id, resume="allow")


def _board(folder: Path, **options: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard", **options)


def _continued(path: Path, first_step: int) -> TextIO:
    """A file of lines to go on with. Steps taken after the checkpoint will be taken, and written, again."""
    return continue_json_lines(path, lambda line: line.get("step", -1) < first_step)
