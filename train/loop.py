"""Training of one stage: set-up, the step, and the end."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from ssm_kernels import NonFiniteError
from ssm_kernels.context_parallel import SequenceSharding, context_parallel

from ..model.files import writing_atomic
from ..model.quantize import is_quantized
from ..model.vlm import VLM
from .checkpoint import Checkpoints
from .config import Changeable, StageConfig
from .distributed import (
    average_replicated_gradients,
    context_group,
    gather_into,
    on_first_rank,
    rank,
    recomputed_blocks,
    shard,
    sum_over_ranks,
    world_size,
)
from .errors import Interrupted
from .identity import Fingerprint, check_changeable, run_identity
from .loader import Loader, Samples, StepData
from .lock import only_run_in
from .lora import add_lora, merge_lora
from .optim import clip_gradients, freeze_all_but, learning_rate, make_optimizer
from .signals import handling
from .track import Tracker

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that end the stage after a checkpoint."""


def train_stage(
    model: nn.Module,
    stage: StageConfig,
    samples: Samples,
    collate: Callable[[Sequence[Any]], Any],
    folder: str | Path,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, nn.Module], None] | None = None,
    make_tracker: Callable[[Path, str, int, int], Tracker] = Tracker,
    data: Sequence[Fingerprint] = (),
    may_change: Sequence[Changeable] = (),
) -> None:
    """Train a model in place, and write metrics and the last checkpoints to `folder`.

    A stage that was interrupted, at any step and in any way, resumes from its last checkpoint when it is called again
    with the same arguments, and on a CPU takes exactly the steps that it would have taken. Other arguments are an
    error: a checkpoint carries the identity of its run (`run_identity`).

    Within `distributed.processes` all ranks call this, each with all of the data. A sharded copy of the model is
    trained; at the end the trained parameters are copied to rank 0's model, and to every other model that has weights.
    The steps are those of one process, to rounding, and the number of ranks may change on resume.

    Args:
        model: `model(batch)` returns an object with `loss`, the mean over target tokens, and `n_targets`, their number.
        stage: trainable parameters, optimizer, schedule, batch and checkpointing.
        samples: the training set.
        collate: maps a list of samples to a batch with `to(device)`, `n_targets` and `n_tokens`.
        folder: folder of this stage alone.
        device: device of this rank.
        on_step: called after each step, on every rank, with the step and the model that is trained.
        make_tracker: called with folder, name of the stage, first step and number of steps.
        data: fingerprints of the files that `samples` are read from, for the identity of the run.
        may_change: settings of the stage that may differ from those of the checkpoint.

    Raises:
        ValueError: the last checkpoint is of another run, or the batch cannot be divided equally among the ranks; or
            the model is quantized, and trained without adapters or by several ranks.
        BlockingIOError: another run is in the folder.
        FloatingPointError: loss, gradient or weights are not finite, or the loss is above `max_loss`. The batch is
            saved in the folder; earlier checkpoints stay.
        Interrupted: SIGTERM or Ctrl-C came to any rank; a checkpoint is saved.
        OSError: a checkpoint could not be written; earlier ones stay.
        Exception: as `Loader` raises it; a checkpoint is saved.
    """
    folder, device = Path(folder), torch.device(device)
    check_changeable(may_change)
    if not len(samples):
        raise ValueError(f"stage {stage.name!r} has no samples to train on")
    if stage.context_parallel > 1 and not isinstance(model, VLM):
        raise ValueError(f"context_parallel is for a VLM, and stage {stage.name!r} trains a {type(model).__name__}")
    if world_size() > 1 and is_quantized(model):
        raise ValueError(f"a quantized model is trained by one process, and stage {stage.name!r} has {world_size()}")
    # Ranks that share batches count as one reader of the data.
    context = context_group(stage.context_parallel)
    n_steps = stage.steps(len(samples))
    # Before LoRA and sharding change the model: a resume computes the identity from the same weights.
    run = on_first_rank(lambda: run_identity(model, stage, samples, data))
    torch.manual_seed(stage.seed)
    trainer = _set_up(model, stage, n_steps, folder, device, context)
    parameters = trainer.parameters
    with contextlib.ExitStack() as stack:
        # Entered first, so that a second signal does not interrupt the writing of a checkpoint.
        received = stack.enter_context(_received_signals())
        stack.enter_context(only_run_in(folder))
        checkpoints = stack.enter_context(
            contextlib.closing(
                Checkpoints(folder, parameters, trainer.optimizer, stage.keep_last, run, tuple(may_change))
            )
        )
        first_step = checkpoints.load()
        if first_step > n_steps:
            raise ValueError(f"the checkpoint in {folder} is of step {first_step}, beyond the {n_steps} steps to take")
        tracker = None
        if rank() == 0 and first_step == n_steps:
            tqdm.write(f"{stage.name}: finished already, {n_steps:,} steps; restored from {folder}")
        elif rank() == 0:
            tracker = stack.enter_context(contextlib.closing(make_tracker(folder, stage.name, first_step, n_steps)))
            tracker.bar.write(f"{stage.name}: {_parameter_counts(model)}; {len(samples):,} samples, {n_steps:,} steps")
        if stage.gradient_checkpointing:
            stack.enter_context(recomputed_blocks(trainer.model))
        loader = Loader(
            samples, stage, collate, first_step=first_step, n_steps=n_steps,
            rank=rank() // stage.context_parallel, world_size=world_size() // stage.context_parallel, folder=folder,
        )  # fmt: skip
        steps = stack.enter_context(contextlib.closing(iter(loader)))
        # The optimizer, the parameters and the loader are at first_step now.
        for step in range(first_step, n_steps):
            step_data, n_targets = _next_data(steps, step, stage, checkpoints)
            start = time.perf_counter()
            result = train_step(trainer, step, step_data.micro_batches, n_targets, received)
            if tracker is not None:
                tracker.step(
                    step, n_tokens=result.n_tokens, n_samples=stage.batch_size, loss=result.loss, lr=result.lr,
                    grad_norm=result.grad_norm, wait=step_data.wait,
                    seconds=step_data.wait + time.perf_counter() - start,
                )  # fmt: skip
            if on_step is not None:
                with trainer.autocast():
                    on_step(step, trainer.model)
            if any(result.signals) or step + 1 == n_steps or (step + 1) % stage.save_every == 0:
                try:
                    checkpoints.save(step + 1)
                except FloatingPointError as e:
                    batch = step_data.micro_batches[0]
                    raise trainer.non_finite(batch, f"has trained to a non-finite value: {e}") from e
            _raise_if_signalled(result.signals)
    # A signal may have come since the last step.
    _raise_if_signalled(sum_over_ranks(*(received.count(s) for s in SIGNALS)))
    # From the sharded copy back to the caller's model, then LoRA into its weights.
    if trainer.model is not model:
        gather_into(model, parameters)
    merge_lora(model)
    on_first_rank(lambda: _check_finite(model, stage))


@dataclass(frozen=True)
class Trainer:
    """A model, and what a step of its training needs."""

    model: nn.Module
    """The model itself on one rank, a sharded copy on several."""
    parameters: dict[str, nn.Parameter]
    """Trainable parameters by name."""
    optimizer: torch.optim.AdamW
    stage: StageConfig
    n_steps: int
    folder: Path
    device: torch.device
    context: dist.ProcessGroup | None
    """Ranks that split each batch along its tokens; None where each rank has batches of its own."""

    def autocast(self) -> torch.autocast:
        """Context in which the model runs at the stage's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.stage.precision == "bf16")

    def non_finite(self, batch: Any, what: str) -> FloatingPointError:
        """Save a batch, and build the error that names it."""
        path = self.folder / f"bad-batch-{rank()}.pt"
        with writing_atomic(path) as partial:
            torch.save(vars(batch), partial)
        return FloatingPointError(
            f"stage {self.stage.name!r} {what}; the worst batch is saved in {path}. A lower lr or grad_clip may help: "
            "pass it with --may-change lr (or grad_clip) to resume from the last checkpoint; delete that one to resume "
            "from the one before it"
        )


@dataclass(frozen=True)
class StepResult:
    """Figures of one step, equal on all ranks."""

    loss: float
    """Mean over the target tokens of all ranks."""
    n_tokens: int
    lr: float
    grad_norm: float
    """Norm before clipping."""
    signals: list[float]
    """Number of ranks' receipts of each of `SIGNALS`."""


def train_step(
    trainer: Trainer, step: int, micro_batches: Sequence[Any], n_targets: float, received: Sequence[int] = ()
) -> StepResult:
    """Run forward, backward and the optimizer over the batches of one step.

    Args:
        trainer: model and optimizer; both are updated in place.
        step: step number, from 0. With the stage's seed and the rank it seeds dropout.
        micro_batches: batches of this rank, whose gradients are accumulated.
        n_targets: target tokens in the batches of all ranks, which the loss is averaged over.
        received: signals that this rank has received, to be shared with the other ranks.

    Raises:
        FloatingPointError: loss or gradient is not finite, or the loss is above `max_loss`. The weights are unchanged.
    """
    stage = trainer.stage
    lr = learning_rate(stage, step, trainer.n_steps)
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
    # Dropout draws from a generator that depends on the step alone, so that a resumed step is the same.
    torch.manual_seed(_step_seed(stage.seed, step))
    losses = _accumulate_gradients(trainer, micro_batches, n_targets)
    # One all-reduce for the loss, the token count and the signals, so that all ranks stop after the same step.
    loss, n_tokens, *signals = sum_over_ranks(
        sum(losses), sum(b.n_tokens for b in micro_batches), *(received.count(s) for s in SIGNALS)
    )
    # FSDP has averaged the sharded gradients in the backward; these are the others.
    average_replicated_gradients(trainer.parameters.values())
    norm = clip_gradients(list(trainer.parameters.values()), stage.grad_clip)
    if not (math.isfinite(loss) and loss <= stage.max_loss and math.isfinite(norm)):
        # The batch with the largest loss, a non-finite one before all others, is saved for inspection.
        worst = max(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
        what = f"has a loss of {loss:.4g} (max_loss is {stage.max_loss:g}) and a gradient of norm {norm:.4g}"
        raise trainer.non_finite(micro_batches[worst], what)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    # Each batch is counted by all ranks that split it.
    return StepResult(loss, int(n_tokens // stage.context_parallel), lr, norm, signals)


def _accumulate_gradients(trainer: Trainer, micro_batches: Sequence[Any], n_targets: float) -> list[float]:
    """Run forward and backward of each batch.

    Returns:
        The contribution of each batch to the mean loss over the `n_targets` target tokens of all ranks. A rank that
        shares a batch with others has the loss of its own tokens.
    """
    losses = []
    for batch in micro_batches:
        sharding = None if trainer.context is None else SequenceSharding.even(batch.n_tokens, trainer.context)
        with contextlib.nullcontext() if sharding is None else context_parallel(sharding):
            try:
                with trainer.autocast():
                    out = trainer.model(batch.to(trainer.device))
            except NonFiniteError as e:
                # Only scans on a CPU check their values; elsewhere the loss shows it.
                raise trainer.non_finite(batch, f"met a non-finite value ({e})") from e
            # A mean over the target tokens of all batches and ranks: batches with more targets weigh more.
            loss = out.loss * (out.n_targets / n_targets)
            (loss * world_size()).backward()  # gradients are averaged over the ranks, and this undoes the division
            losses.append(loss.detach())
    # One host-device synchronization for all batches.
    return torch.stack(losses).tolist()


def _set_up(
    model: nn.Module,
    stage: StageConfig,
    n_steps: int,
    folder: Path,
    device: torch.device,
    context: dist.ProcessGroup | None,
) -> Trainer:
    """Add LoRA, freeze parameters, shard the model over the ranks, and make the optimizer."""
    if stage.lora is not None:
        add_lora(model, stage.lora)
    model.train()
    for p in freeze_all_but(model, stage.trainable).values():
        p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))  # bfloat16 would round small updates away
    trained = model.to(device) if world_size() == 1 else shard(model, device, stage.precision)
    parameters = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    return Trainer(trained, parameters, make_optimizer(parameters, stage), stage, n_steps, folder, device, context)


def _next_data(
    steps: Iterator[StepData], step: int, stage: StageConfig, checkpoints: Checkpoints
) -> tuple[StepData, float]:
    """Wait for the batches of a step. An error of any rank's data ends the stage on all of them, with a checkpoint.

    Returns:
        This rank's batches, and the number of target tokens of all ranks.
    """
    step_data, problem = None, None
    try:
        step_data = next(steps)
    except Exception as e:  # broken or changed data, or a dead worker: the other ranks must know before it is raised
        problem = e
    batches = [] if step_data is None else step_data.micro_batches
    n_targets, n_problems = sum_over_ranks(sum(b.n_targets for b in batches), problem is not None)
    if n_problems:
        if step > checkpoints.newest:
            checkpoints.save(step)
        raise problem or OSError(f"stage {stage.name!r} stops at step {step}: another rank has no data")
    assert step_data is not None
    return step_data, n_targets / stage.context_parallel  # each batch is counted by all ranks that split it


def _raise_if_signalled(counts: Sequence[float]) -> None:
    """Raise `Interrupted` where any of `SIGNALS` came to any rank."""
    for number, count in zip(SIGNALS, counts, strict=True):
        if count:
            raise Interrupted(128 + number)


def _step_seed(seed: int, step: int) -> int:
    """Seed of one step on this rank. It is a function of the step, so that a resume needs no random state."""
    return int(np.random.SeedSequence((seed, step, rank())).generate_state(1, np.uint64)[0])


def _check_finite(model: nn.Module, stage: StageConfig) -> None:
    """Check the weights at the end of a stage, with LoRA merged."""
    own = dict(model.named_parameters())
    bad = [n for n, p in own.items() if not p.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"stage {stage.name!r} leaves {len(bad)} of {len(own)} weights that are not finite: {', '.join(bad[:3])}"
        )


def _parameter_counts(model: nn.Module) -> str:
    """Trainable and frozen parameters of each part of the model."""
    counts: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        entry = counts.setdefault(name.split(".")[0], [0, 0])
        entry[0 if p.requires_grad else 1] += p.numel()
    parts = []
    for part, (trainable, frozen) in counts.items():
        parts.append(f"{part} {trainable:,} trainable" if trainable else f"{part} {frozen:,} frozen")
    return ", ".join(parts)


@contextlib.contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collect the `SIGNALS` that this process receives. A second Ctrl-C raises at once."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    with handling(SIGNALS, handle):
        yield received
