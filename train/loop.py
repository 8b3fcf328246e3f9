"""The loop of one stage."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .checkpoint import load_newest, save_checkpoint
from .config import StageConfig
from .lora import add_lora, merge_lora
from .optim import freeze_all_but, learning_rate, make_optimizer
from .sampler import samples_of_step
from .track import Tracker


class Samples(Protocol):
    """What is trained on: numbered samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Interrupted(SystemExit):
    """The stage was asked to stop, has saved, and can be started again. Exit status 130, as after Ctrl-C."""


def train_stage(
    model: nn.Module,
    stage: StageConfig,
    samples: Samples,
    collate: Callable[[Sequence[Any]], Any],
    folder: str | Path,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, nn.Module], None] | None = None,
    make_tracker: Callable[[Path, str, int, int], Tracker] = Tracker,
) -> None:
    """Train a model in place, and leave in `folder` the metrics and the last checkpoints.

    A stage that was interrupted, at any step and in any way, goes on from its last checkpoint when it is called
    again with the same arguments, and on a CPU takes exactly the steps that it would have taken.

    Args:
        model: `model(batch)` gives a value with `loss`, the mean over learned tokens, and `n_targets`, their number.
        samples: the training set.
        collate: a list of samples to a batch with `to(device)`, `n_targets` and `n_tokens`.
        folder: of this stage alone.
        on_step: called with the step and the model after each.
        make_tracker: a `Tracker`, given the first four of its arguments.

    Raises:
        FloatingPointError: the loss is not finite; the batch is saved in the folder.
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint is saved.
        OSError: a checkpoint could not be written.
    """
    folder = Path(folder)
    if not len(samples):
        raise ValueError(f"stage {stage.name!r} has no samples to train on")
    torch.manual_seed(stage.seed)
    if stage.lora is not None:
        add_lora(model, stage.lora)
    model.to(device).train()
    parameters = freeze_all_but(model, stage.trainable)
    optimizer = make_optimizer(parameters, stage)
    n_steps = stage.steps(len(samples))
    first_step = load_newest(folder, parameters, optimizer)
    if first_step >= n_steps:
        merge_lora(model)
        return

    tracker = make_tracker(folder, stage.name, first_step, n_steps)
    tracker.bar.write(f"{stage.name}: {_counts(model)}; {len(samples):,} samples, {n_steps:,} steps")
    try:
        with _stop_asked_for() as asked:
            for step in range(first_step, n_steps):
                begin = time.perf_counter()
                lr = learning_rate(stage, step, n_steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                chosen = samples_of_step(len(samples), stage.batch_size, stage.seed, step)
                batches = _micro_batches(stage, samples, chosen, collate)
                wait = time.perf_counter() - begin
                loss, n_tokens = _accumulate(model, stage, batches, device, folder)
                norm = torch.nn.utils.clip_grad_norm_(parameters.values(), stage.grad_clip).item()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                tracker.step(
                    step, n_tokens=n_tokens, n_samples=len(chosen), loss=loss, lr=lr, grad_norm=norm, wait=wait,
                    seconds=time.perf_counter() - begin,
                )  # fmt: skip
                if on_step is not None:
                    on_step(step, model)
                if asked or step + 1 == n_steps or (step + 1) % stage.save_every == 0:
                    save_checkpoint(folder, step + 1, parameters, optimizer, stage.keep_last)
                if asked and step + 1 < n_steps:
                    raise Interrupted(130)
    finally:
        tracker.close()
    merge_lora(model)


def _micro_batches(stage: StageConfig, samples: Samples, chosen: list[int], collate: Callable) -> list[Any]:
    size = stage.micro_batch_size or stage.batch_size
    return [collate([samples[i] for i in chosen[k : k + size]]) for k in range(0, len(chosen), size)]


def _accumulate(
    model: nn.Module, stage: StageConfig, batches: list[Any], device: str | torch.device, folder: Path
) -> tuple[float, int]:
    """Gradients of the mean loss over all learned tokens of a step; the loss, and the tokens that were run."""
    n_targets = sum(b.n_targets for b in batches)
    total = 0.0
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=stage.precision == "bf16"):
            out = model(batch)
        loss = out.loss * (out.n_targets / n_targets)
        loss.backward()
        total += loss.item()
        if not math.isfinite(total):
            path = folder / "bad-batch.pt"
            torch.save(vars(batch.to("cpu")), path)
            raise FloatingPointError(
                f"the loss of stage {stage.name!r} became {total}; the batch is saved in {path}. "
                "A lower lr or grad_clip may help"
            )
    return total, sum(b.n_tokens for b in batches)


def _counts(model: nn.Module) -> str:
    """Parameters by part, and whether they learn."""
    counts: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        entry = counts.setdefault(name.split(".")[0], [0, 0])
        entry[0 if p.requires_grad else 1] += p.numel()
    parts = []
    for part, (learning, frozen) in counts.items():
        parts.append(f"{part} {learning:,} trained" if learning else f"{part} {frozen:,} frozen")
    return ", ".join(parts)


@contextlib.contextmanager
def _stop_asked_for() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGTERM or Ctrl-C has come. A second Ctrl-C stops at once."""
    asked: list[int] = []

    def handle(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals are not ours to handle
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
