"""The loop of one stage."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from ssm_kernels import NonFiniteError
from ssm_kernels.context_parallel import SequenceSharding, context_parallel

from ..model.files import writing_whole
from ..model.vlm import VLM
from .checkpoint import Checkpoints
from .config import Changeable, StageConfig
from .distributed import (
    context_group,
    gather_into,
    on_first_rank,
    rank,
    recomputed_blocks,
    shard,
    sum_over_ranks,
    sum_whole_gradients,
    world_size,
)
from .errors import Interrupted
from .identity import Fingerprint, check_changeable, run_identity
from .loader import Loader, Samples
from .lock import only_run_in
from .lora import add_lora, merge_lora
from .optim import clip_gradients, freeze_all_but, learning_rate, make_optimizer
from .track import Tracker

STOPS = (signal.SIGTERM, signal.SIGINT)


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
    """Train a model in place, and leave in `folder` the metrics and the last checkpoints.

    A stage that was interrupted, at any step and in any way, goes on from its last checkpoint when it is called
    again with the same arguments, and on a CPU takes exactly the steps that it would have taken. With others it is
    refused: a checkpoint carries the identity of its run (`run_identity`).

    Within `distributed.processes` all ranks call this, each with the whole data. A copy of the model is sharded over
    them and trained; rank 0's model, and every other that has weights, is given what was learned in the end. The steps
    are those of one process, to rounding, and the number of ranks may change at a resume.

    Args:
        model: `model(batch)` gives a value with `loss`, the mean over learned tokens, and `n_targets`, their number.
        samples: the training set.
        collate: a list of samples to a batch with `to(device)`, `n_targets` and `n_tokens`.
        folder: of this stage alone.
        on_step: called after each step, on every rank, with the step and the model that is trained.
        make_tracker: a `Tracker`, given the first four of its arguments.
        data: the files that `samples` are read from, for the identity of the run.
        may_change: settings of the stage that may differ from those of the checkpoint.

    Raises:
        ValueError: the last checkpoint is of another run, or the batch cannot be shared equally.
        BlockingIOError: another run is in the folder.
        FloatingPointError: loss, gradient or weights are not finite, or the loss is too large. The batch is saved in
            the folder; checkpoints are those before.
        Interrupted: SIGTERM or Ctrl-C came to any rank; a checkpoint is saved.
        OSError: a checkpoint could not be written; those before are as they were.
        Exception: as `Loader` raises it; a checkpoint is saved.
    """
    folder, device = Path(folder), torch.device(device)
    check_changeable(may_change)
    if not len(samples):
        raise ValueError(f"stage {stage.name!r} has no samples to train on")
    if stage.context_parallel > 1 and not isinstance(model, VLM):
        raise ValueError(f"context_parallel is for a VLM, and stage {stage.name!r} trains a {type(model).__name__}")
    neighbours = context_group(stage.context_parallel)
    n_steps = stage.steps(len(samples))
    run = on_first_rank(lambda: run_identity(model, stage, samples, data))
    torch.manual_seed(stage.seed)
    if stage.lora is not None:
        add_lora(model, stage.lora)
    model.train()
    for p in freeze_all_but(model, stage.trainable).values():
        p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))  # a step is too small for bfloat16 to hold
    trained = model.to(device) if world_size() == 1 else shard(model, device, stage.precision)
    parameters = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, stage)
    with contextlib.ExitStack() as stack:
        # The first to be entered, so that a second signal does not end the writing of a checkpoint.
        asked = stack.enter_context(_stop_asked_for())
        stack.enter_context(only_run_in(folder))
        checkpoints = stack.enter_context(
            contextlib.closing(Checkpoints(folder, parameters, optimizer, stage.keep_last, run, tuple(may_change)))
        )
        first_step = checkpoints.load()
        if first_step > n_steps:
            raise ValueError(
                f"the checkpoint in {folder} is of step {first_step}, beyond the {n_steps} steps asked for"
            )
        tracker = None
        if rank() == 0 and first_step == n_steps:
            tqdm.write(f"{stage.name}: finished already, {n_steps:,} steps; restored from {folder}")
        elif rank() == 0:
            tracker = stack.enter_context(contextlib.closing(make_tracker(folder, stage.name, first_step, n_steps)))
            tracker.bar.write(f"{stage.name}: {_counts(model)}; {len(samples):,} samples, {n_steps:,} steps")
        if stage.gradient_checkpointing:
            stack.enter_context(recomputed_blocks(trained))
        loader = Loader(
            samples, stage, collate, first_step=first_step, n_steps=n_steps,
            rank=rank() // stage.context_parallel, world_size=world_size() // stage.context_parallel, folder=folder,
        )  # fmt: skip
        steps = stack.enter_context(contextlib.closing(iter(loader)))
        for step in range(first_step, n_steps):
            step_data, problem = None, None
            try:
                step_data = next(steps)
            except Exception as e:  # broken data, a file that has changed, a worker that died: told to all ranks first
                problem = e
            batches = [] if step_data is None else step_data.micro_batches
            n_targets, n_problems = sum_over_ranks(sum(b.n_targets for b in batches), problem is not None)
            if n_problems:
                if step > checkpoints.newest:
                    checkpoints.save(step)
                raise problem or OSError(f"stage {stage.name!r} stops at step {step}: another rank has no data")
            assert step_data is not None
            begin = time.perf_counter()
            lr = learning_rate(stage, step, n_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(_seed(stage.seed, step))
            losses = _accumulate(
                trained, stage, batches, n_targets / stage.context_parallel, device, folder, neighbours
            )
            loss, n_tokens, *stops = sum_over_ranks(
                sum(losses), sum(b.n_tokens for b in batches), *(asked.count(s) for s in STOPS)
            )
            n_tokens //= stage.context_parallel  # each batch is counted by all that split it
            sum_whole_gradients(parameters.values())
            norm = clip_gradients(list(parameters.values()), stage.grad_clip)
            if not (math.isfinite(loss) and loss <= stage.max_loss and math.isfinite(norm)):
                worst = max(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
                what = f"has a loss of {loss:.4g} (max_loss is {stage.max_loss:g}) and a gradient of norm {norm:.4g}"
                raise _not_a_number(stage, batches[worst], folder, what)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if tracker is not None:
                tracker.step(
                    step, n_tokens=int(n_tokens), n_samples=stage.batch_size, loss=loss, lr=lr, grad_norm=norm,
                    wait=step_data.wait, seconds=step_data.wait + time.perf_counter() - begin,
                )  # fmt: skip
            if on_step is not None:
                with _autocast(stage, device):
                    on_step(step, trained)
            if any(stops) or step + 1 == n_steps or (step + 1) % stage.save_every == 0:
                try:
                    checkpoints.save(step + 1)
                except FloatingPointError as e:
                    raise _not_a_number(stage, batches[0], folder, f"has learned what is no number: {e}") from e
            _stop_if_asked(stops)
    # A signal may have come since the last step.
    _stop_if_asked(sum_over_ranks(*(asked.count(s) for s in STOPS)))
    if trained is not model:
        gather_into(model, parameters)
    merge_lora(model)
    on_first_rank(lambda: _check_finite(model, stage))


def _stop_if_asked(counts: Sequence[float]) -> None:
    """Raise `Interrupted` where any of `STOPS` came to any rank."""
    for number, count in zip(STOPS, counts, strict=True):
        if count:
            raise Interrupted(128 + number)


def _seed(seed: int, step: int) -> int:
    """Of the random numbers of one step on this rank, so that a resume needs no state."""
    return int(np.random.SeedSequence((seed, step, rank())).generate_state(1, np.uint64)[0])


def _accumulate(
    model: nn.Module,
    stage: StageConfig,
    batches: list[Any],
    n_targets: float,
    device: torch.device,
    folder: Path,
    neighbours: dist.ProcessGroup | None,
) -> list[float]:
    """Gradients of the mean loss over the `n_targets` target tokens of a step, of all ranks; each batch's part of that
    loss.

    Where `neighbours` split a batch, each has the loss of its own tokens.
    """
    losses = []
    for batch in batches:
        sharding = None if neighbours is None else SequenceSharding.even(batch.n_tokens, neighbours)
        with contextlib.nullcontext() if sharding is None else context_parallel(sharding):
            try:
                with _autocast(stage, device):
                    out = model(batch.to(device))
            except NonFiniteError as e:
                # On a CPU the scans look; elsewhere the loss will show it.
                raise _not_a_number(stage, batch, folder, f"met what is not a number ({e})") from e
            loss = out.loss * (out.n_targets / n_targets)
            (loss * world_size()).backward()  # gradients are averaged over ranks
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


def _autocast(stage: StageConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=stage.precision == "bf16")


def _not_a_number(stage: StageConfig, batch: Any, folder: Path, what: str) -> FloatingPointError:
    """An error that says what came of a batch, which is saved."""
    path = folder / f"bad-batch-{rank()}.pt"
    with writing_whole(path) as partial:
        torch.save(vars(batch), partial)
    return FloatingPointError(
        f"stage {stage.name!r} {what}; the worst batch is saved in {path}. A lower lr or grad_clip may help: give it "
        "with --may-change lr (or grad_clip) to go on from the last checkpoint; delete that one to go on from the one "
        "before it"
    )


def _check_finite(model: nn.Module, stage: StageConfig) -> None:
    """Look at the weights that a stage leaves, merged as they are."""
    own = dict(model.named_parameters())
    bad = [n for n, p in own.items() if not p.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"stage {stage.name!r} leaves {len(bad)} of {len(own)} weights that are not finite: {', '.join(bad[:3])}"
        )


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
    """A list of the signals of `STOPS` that have come. A second Ctrl-C stops at once."""
    asked: list[int] = []

    def handle(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {s: signal.signal(s, handle) for s in STOPS}
    except ValueError:  # not the main thread: signals are not ours to handle
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
