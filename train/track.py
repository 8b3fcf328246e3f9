"""Metrics of a stage: JSONL, TensorBoard where it is installed, Weights & Biases on request, and a progress bar."""

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
from ..model.prompt import IMAGE_MARK
from .distributed import rank
from .records import Record
from .sources import read_visual


class Tracker:
    """Logger of the metrics of each step. After a resume the curves continue without a gap or overlap.

    `metrics.jsonl` has the reproducible metrics (loss, learning rate, gradient norm), `speeds.jsonl` the others.

    Args:
        folder: folder of the stage.
        name: name of the stage, for the progress bar.
        first_step: step to start at.
        n_steps: number of steps of the stage.
        flops_per_token: FLOPs of training on one token; with `peak_flops` the utilization is logged.
        peak_flops: peak FLOPs a second of all devices together, at the training precision.
        wandb: Weights & Biases project; None logs nothing there.

    Raises:
        ModuleNotFoundError: `wandb` is not None and the package is not installed.
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
        # First, since it may raise: a missing package leaves no files behind.
        self.wandb = None if wandb is None else _start_wandb(wandb, folder, name)
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = _resume_lines(folder / "metrics.jsonl", first_step)
        self.speeds = _resume_lines(folder / "speeds.jsonl", first_step)
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
        """Log one step.

        Args:
            step: step number, from 0.
            n_tokens: tokens of all ranks.
            n_samples: samples of all ranks.
            loss: mean over the target tokens.
            lr: learning rate.
            grad_norm: norm of the gradient before clipping.
            wait: seconds that the loop waited for data.
            seconds: duration of the step, `wait` included.
        """
        metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        speeds = {
            "tokens_per_second": n_tokens / seconds,
            "samples_per_second": n_samples / seconds,
            "data_wait": wait / seconds,
            "peak_memory": peak_memory(),
        }
        # Model FLOPs utilization (arXiv 2204.02311, appendix B), without recomputation.
        if self.flops_per_token is not None and self.peak_flops is not None:
            speeds["utilization"] = self.flops_per_token * n_tokens / seconds / self.peak_flops
        self.metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self.speeds.write(json.dumps({"step": step, **speeds}) + "\n")
        if self.board:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, step)
            for name, value in speeds.items():
                self.board.add_scalar(f"speed/{name}", value, step)
        if self.wandb:
            self.wandb.log({**metrics, **{f"speed/{n}": v for n, v in speeds.items()}}, step=step)
        self.tokens += n_tokens
        self.seconds += seconds
        self.bar.set_postfix_str(self._line(metrics, speeds), refresh=False)
        self.bar.update()

    def _line(self, metrics: Mapping[str, float], speeds: Mapping[str, float]) -> str:
        parts = [f"loss {metrics['loss']:.3f}", f"{self.tokens / self.seconds:,.0f} tokens/s"]
        if "utilization" in speeds:
            parts.append(f"{speeds['utilization']:.0%} of peak")
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
    """Answers of a model to fixed questions during training: lines on stderr and in `answers.jsonl`, and text in
    TensorBoard.

    An `on_step` of `train_stage`. It is called on every rank, and rank 0 writes.

    Args:
        folder: folder of the stage.
        records: conversations; their first questions are asked, and their first answers are the correct ones.
        every: steps between answers.
        precision: precision of the stage.
        max_new_tokens: longest answer, in tokens.
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
        # On every rank, since generation gathers sharded weights.
        answers = self._answer(model)
        if rank():
            return
        for record, answer in zip(self.records, answers, strict=True):
            question, truth = (t.text for t in record.turns[:2])
            asked = question.replace(IMAGE_MARK, "").strip()
            tqdm.write(f"step {step + 1}: {asked!r} → {answer!r}, truth {truth!r}", file=sys.stderr)
        board = _board(self.folder)
        # After a resume a step is taken again, and its answers replace the earlier ones.
        with _resume_lines(self.folder / "answers.jsonl", step) as file:
            for i, (record, answer) in enumerate(zip(self.records, answers, strict=True)):
                question, truth = (t.text for t in record.turns[:2])
                images = [str(image) for image in record.first_question()[1]]
                line = {"step": step, "images": images, "question": question, "truth": truth, "answer": answer}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                if board:
                    board.add_text(f"answer {i}", f"{question}\n\ntruth: {truth}\n\nanswer: {answer}", step)
        if board:
            board.close()

    def _answer(self, model: Any) -> list[str]:
        was_training, shards = model.training, [m for m in model.modules() if isinstance(m, FSDPModule)]
        device = next((p.device.type for p in model.parameters()), "cpu")
        questions = [record.first_question() for record in self.records]
        images = [[read_visual(image) for image in seen] for _, seen in questions]
        for module in shards:
            module.unshard()  # generation also reads weights without calling their module
        # Gathered weights change their addresses, so no CUDA graph can be used; under autocast generation uses none.
        half = self.precision == "bf16" or (bool(shards) and device == "cuda")
        model.eval()
        try:
            with torch.autocast(device, torch.bfloat16, enabled=half):
                return model.generate([[turn] for turn, _ in questions], images, self.config)
        finally:
            model.train(was_training)
            for module in shards:
                module.reshard()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the metrics of every step of a stage; damaged lines are skipped with a warning."""
    return [line.value for line in json_lines(folder / "metrics.jsonl") if line.value is not None]


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # In KiB, on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _start_wandb(project: str, folder: Path, name: str) -> Any:
    if importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError("wandb is not installed: pip install wandb")
    import wandb  # pyright: ignore[reportMissingImports]  optional

    # The id is derived from the folder, so that a resume continues the same run.
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=f"{folder.parent.name}/{name}", id=run_id, resume="allow")


def _board(folder: Path, purge_step: int | None = None) -> Any:
    """TensorBoard writer that hides logged steps from `purge_step` on; None where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard", purge_step=purge_step)


def _resume_lines(path: Path, first_step: int) -> TextIO:
    """Open a file of lines to append to, without the steps after the checkpoint, which are taken again."""
    return continue_json_lines(path, lambda line: line.get("step", -1) < first_step)
