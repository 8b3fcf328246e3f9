"""A sequence sharded over ranks has the results of one rank: outputs, final states, every gradient.

Three processes are started once, and run every case of `CASES`; each also computes the complete sequence itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssm_kernels import (
    SequenceSharding,
    causal_conv1d,
    context_parallel,
    cross_causal_conv1d,
    selective_scan,
    ssd,
)
from ssm_kernels.context_parallel import gather_final_states
from ssm_kernels.context_parallel.sharding import RankShard
from ssm_kernels.modules import Mamba, Mamba2, MixerState
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, Batch, ImageProcessor, LMConfig, MambaLM, VisionConfig, ViTConfig, VLMConfig
from vlmamba.model.prompt import IGNORE, IMAGE_TOKEN

WORLD = 3
CASES: dict[str, Callable[[], None]] = {}


def case(*variants: tuple) -> Callable:
    """Register a function that all ranks run, once a variant."""

    def register(function: Callable) -> Callable:
        for v in variants or [()]:
            CASES["-".join([function.__name__, *map(str, v)]).replace(" ", "")] = partial(function, *v)
        return function

    return register


def same(name: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name}: {m}")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


GROUPS: dict[int, dist.ProcessGroup | None] = {}
"""Process groups by their number of ranks."""


def shard_over(lengths: tuple[int, ...]) -> SequenceSharding | None:
    """None on a rank outside of the group."""
    if dist.get_rank() >= len(lengths):
        return None
    return SequenceSharding(lengths, GROUPS[len(lengths)])


def gradient(t: Tensor) -> Tensor:
    """Gradient of a leaf; zeros on a rank that has no step."""
    return torch.zeros_like(t) if t.grad is None else t.grad


def weighted(t: Tensor) -> Tensor:
    """Weights of the elements in a loss."""
    return torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view(t.shape)


# --- the ops ----------------------------------------------------------------------------------------------------

LENGTHS = [(5, 3, 4), (7, 0, 5), (1, 1, 10), (0, 2, 10), (6, 6)]
BOUNDS = [None, (0, 12), (0, 2, 9, 9, 12), (0, 5, 7, 8, 12)]
GRID = [(s, b, (i + j) % 2 == 0) for i, s in enumerate(LENGTHS) for j, b in enumerate(BOUNDS)]
GRID += [(LENGTHS[1], b, i == 0) for i, b in enumerate(BOUNDS[:2])]


def scan_inputs(rows: int, batch: int, initial: bool) -> tuple[dict[str, Tensor], dict]:
    timed = {"u": random(batch, 12, 4), "dt": random(batch, 12, 4), "z": random(batch, 12, 4)}
    timed |= {"B": random(batch, 12, 2, 3), "C": random(batch, 12, 3)}
    alike = {"A": -random(4, 3).exp(), "D": random(4), "dt_bias": random(4)}
    if initial:
        alike["initial_states"] = random(rows, 4, 3)
    return timed, alike


def ssd_inputs(rows: int, batch: int, initial: bool) -> tuple[dict[str, Tensor], dict]:
    timed = {"x": random(batch, 12, 4, 2), "dt": random(batch, 12, 4), "z": random(batch, 12, 4, 2)}
    timed |= {"B": random(batch, 12, 2, 3), "C": random(batch, 12, 2, 3)}
    alike = {"A": -random(4).exp(), "D": random(4), "dt_bias": random(4)}
    if initial:
        alike["initial_states"] = random(rows, 4, 2, 3)
    return timed, alike


def conv_inputs(rows: int, batch: int, initial: bool) -> tuple[dict[str, Tensor], dict]:
    alike = {"weight": random(4, 4), "bias": random(4)}
    if initial:
        alike["initial_states"] = random(rows, 3, 4)
    return {"x": random(batch, 12, 4)}, alike


OPS = {
    "selective_scan": (selective_scan, scan_inputs, {"dt_softplus": True}),
    "ssd": (ssd, ssd_inputs, {"dt_softplus": True, "dt_limit": (0.1, 2.0), "chunk_size": 4}),
    "causal_conv1d": (causal_conv1d, conv_inputs, {"activation": "silu"}),
}


@case(*((op, *rest) for op in OPS for rest in GRID))
def ops(op: str, lengths: tuple[int, ...], bounds: tuple[int, ...] | None, initial: bool) -> None:
    inputs = OPS[op][1]
    batch, rows = (2, 2) if bounds is None else (1, len(bounds) - 1)
    compare_op(op, lengths, bounds, *inputs(rows, batch, initial))


@case(("scan",), ("ssd",), ("width", 1), ("width", 2), ("width", 6))
def other_forms(form: str, width: int = 4) -> None:
    """B and C constant in time, D a head and channel, no D, z nor bias; other windows."""
    if form == "scan":
        timed = {"u": random(2, 12, 4), "dt": random(2, 12, 4)}
        compare_op(
            "selective_scan", (3, 4, 5), None, timed, {"A": -random(4, 3).exp(), "B": random(4, 3), "C": random(4, 3)}
        )
    elif form == "ssd":
        timed, alike = ssd_inputs(2, 2, False)
        del timed["z"], alike["dt_bias"]
        compare_op("ssd", (3, 4, 5), None, timed, alike | {"D": random(4, 2)})
    else:
        alike = {"weight": random(4, width), "initial_states": random(3, width - 1, 4)}
        compare_op("causal_conv1d", (2, 1, 9), (0, 2, 11, 12), {"x": random(1, 12, 4)}, alike)


@case(("selective_scan", "u", {}), ("ssd", "x", {"chunk_size": 1}))
def growing_decays(op: str, name: str, options: dict) -> None:
    """Those of a rank multiply to infinity, with states of 0 before it and gradients of 0 after it."""
    sharding = shard_over((4, 4, 4))
    run, inputs, _ = OPS[op]
    timed, alike = inputs(2, 2, False)
    timed[name][:, :8] = 0
    timed["C"][:, 4:] = 0
    timed["dt"].fill_(-0.1)[:, 4:8] = -250
    alike = {"A": torch.full_like(alike["A"], -1), "D": alike["D"]}
    y, ends = run(**timed, **alike, **options)
    parts = {name: sharding.shard(t).clone().requires_grad_() for name, t in timed.items()}
    with context_parallel(sharding):
        y_part, ends_part = run(**parts, **alike, **options)
    same("y", y_part, sharding.shard(y))
    same("final states", gather_final_states(sharding, ends_part, 4, None), ends)
    y_part.sum().backward()
    for name, t in parts.items():
        assert gradient(t).isfinite().all(), name


def compare_op(
    op: str,
    lengths: tuple[int, ...],
    bounds: tuple[int, ...] | None,
    timed: dict[str, Tensor],
    alike: dict[str, Tensor],
) -> None:
    sharding = shard_over(lengths)
    if sharding is None:
        return
    run, _, options = OPS[op]
    cu = None if bounds is None else torch.tensor(bounds)
    for t in (*timed.values(), *alike.values()):
        t.requires_grad_()

    y, ends = run(**timed, **alike, **options, cu_seqlens=cu)
    loss = (y * weighted(y)).sum() + (ends * weighted(ends)).sum()
    want = dict(zip([*timed, *alike], torch.autograd.grad(loss, [*timed.values(), *alike.values()]), strict=True))

    parts = {name: sharding.shard(t.detach()).clone().requires_grad_() for name, t in timed.items()}
    with context_parallel(sharding):
        y_part, ends_part = run(**parts, **alike, **options, cu_seqlens=cu)
    same("y", y_part, sharding.shard(y))
    same("final states", gather_final_states(sharding, ends_part, lengths[sharding.rank], cu), ends)
    shard = RankShard.of(sharding, "y", y_part, cu)
    mine = torch.tensor([shard.owner(max(0, b - 1)) == sharding.rank for b in shard.bounds[1:]])
    mine = mine.view(-1, *[1] * (ends.dim() - 1))
    loss = (y_part * sharding.shard(weighted(y))).sum() + (ends_part * weighted(ends) * mine).sum()
    loss.backward()
    for name, t in parts.items():
        same(f"gradient of {name}", gradient(t), sharding.shard(want[name]))
    for name, t in alike.items():
        total = gradient(t)
        dist.all_reduce(total, group=sharding.group)
        same(f"gradient of {name}", total, want[name])


@case()
def scans_over_grids_are_not_sharded() -> None:
    sharding = shard_over((4, 5, 3))
    x, weight = random(1, 2, 3, 4), random(4, 4, 3)
    want = cross_causal_conv1d(x, weight)
    with context_parallel(sharding):
        same("y", cross_causal_conv1d(x, weight), want)


# --- mixers and models ------------------------------------------------------------------------------------------

MIXERS = {"mamba": partial(Mamba, 8, 3), "mamba2": partial(Mamba2, 8, 3, headdim=4, chunk_size=4)}


def compare_gradients(sharding: SequenceSharding, module: torch.nn.Module, want: dict[str, Tensor]) -> None:
    for name, p in module.named_parameters():
        dist.all_reduce(p.grad, group=sharding.group)
        same(f"gradient of {name}", p.grad, want[name])


@case(
    *(
        (family, lengths, bounds, lean, again)
        for family in MIXERS
        for lengths in [(5, 3, 4), (1, 0, 11), (7, 5)]
        for bounds in [None, (0, 4, 10, 12)]
        for lean, again in [(True, False), (True, True), (False, True)][: 3 if bounds else 1]
    )
)
def mixers(family: str, lengths: tuple[int, ...], bounds: tuple[int, ...] | None, lean: bool, again: bool) -> None:
    sharding = shard_over(lengths)
    if sharding is None:
        return
    mixer = MIXERS[family]().double()
    mixer.use_mem_eff_path = lean
    cu = None if bounds is None else torch.tensor(bounds)
    x = random(2 if bounds is None else 1, 12, 8).requires_grad_()
    y = mixer(x, cu_seqlens=cu)
    dx, *grads = torch.autograd.grad((y * weighted(y)).sum(), [x, *mixer.parameters()])
    part = sharding.shard(x.detach()).clone().requires_grad_()
    with context_parallel(sharding):
        y_part = checkpoint(mixer, part, None, cu, use_reentrant=False) if again else mixer(part, cu_seqlens=cu)
        loss = (y_part * sharding.shard(weighted(y))).sum()
        if again:
            loss.backward()
    if not again:  # what a mixer computes again by itself needs no other rank
        loss.backward()
    same("y", y_part, sharding.shard(y))
    same("gradient of x", part.grad, sharding.shard(dx))
    compare_gradients(sharding, mixer, dict(zip(dict(mixer.named_parameters()), grads, strict=True)))


@case(*((family, bounds, grad) for family in MIXERS for bounds in [None, (0, 4, 10, 12)] for grad in (False, True)))
def states(family: str, bounds: tuple[int, ...] | None, grad: bool) -> None:
    sharding = shard_over((5, 1, 6))
    mixer = MIXERS[family]().double()
    cu = None if bounds is None else torch.tensor(bounds)
    x = random(2 if bounds is None else 1, 12, 8)
    state, parted = (mixer.new_state(2 if bounds is None else 3) for _ in range(2))
    for whole, other in zip(state, parted, strict=True):
        other.copy_(whole.normal_())
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            y = mixer(x, state, cu)
            with context_parallel(sharding):
                same("y", mixer(sharding.shard(x), parted, cu), sharding.shard(y))
            for whole, other in zip(state, parted, strict=True):
                same("state", other, whole)


@case(*((family, bounds) for family in MIXERS for bounds in [None, (0, 4, 10, 12)]))
def states_with_gradients(family: str, bounds: tuple[int, ...] | None) -> None:
    """Each rank has the state after the complete sequences, and its gradient goes to the rank that computed it."""
    sharding = shard_over((5, 1, 6))
    mixer = MIXERS[family]().double()
    cu = None if bounds is None else torch.tensor(bounds)
    x = random(2 if bounds is None else 1, 12, 8).requires_grad_()

    def loss(y: Tensor, state: MixerState) -> Tensor:
        return (y * y).sum() + sum(weight * (t * weighted(t)).sum() for t in state)

    y, state = mixer(x, cu_seqlens=cu, return_state=True)
    y, state = mixer(x, state, cu, return_state=True)
    weight = 3.0  # one for each rank
    dx, *grads = torch.autograd.grad(loss(y, state), [x, *mixer.parameters()])
    part, weight = sharding.shard(x.detach()).clone().requires_grad_(), 1.0
    with context_parallel(sharding):
        _, parted = mixer(part, cu_seqlens=cu, return_state=True)
        y_part, parted = mixer(part, parted, cu, return_state=True)
        loss(y_part, parted).backward()
    for whole, other in zip(state, parted, strict=True):
        same("state", other, whole)
    same("gradient of x", part.grad, sharding.shard(dx))
    compare_gradients(sharding, mixer, dict(zip(dict(mixer.named_parameters()), grads, strict=True)))


CONFIGS = {
    "mamba": LMConfig(d_model=8, n_layer=2, vocab_size=24, d_state=3),
    "mamba2": LMConfig(d_model=8, n_layer=2, vocab_size=24, layer="mamba2", d_state=3, headdim=4, chunk_size=4),
}


@case(*((family, packed) for family in CONFIGS for packed in (False, True)))
def language_models(family: str, packed: bool) -> None:
    sharding = SequenceSharding.even(13)
    assert sharding.lengths == (5, 4, 4)
    lm = MambaLM(CONFIGS[family]).double()
    ids = torch.randint(24, (13,))
    cu = torch.tensor([0, 6, 7, 13] if packed else [0, 13])
    targets = Batch(ids, ids, cu.int()).next_tokens()
    packed_bounds = cu if packed else None

    logits = lm(ids[None], cu_seqlens=packed_bounds).logits[0]
    n_targets = int((targets != IGNORE).sum())
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE)
    want = dict(zip(dict(lm.named_parameters()), torch.autograd.grad(loss, list(lm.parameters())), strict=True))
    with context_parallel(sharding):
        part = lm(sharding.shard(ids, 0)[None], cu_seqlens=packed_bounds).logits[0]
    same("logits", part, sharding.shard(logits, 0))
    mine = F.cross_entropy(part, sharding.shard(targets, 0), ignore_index=IGNORE, reduction="sum") / n_targets
    mine.backward()
    compare_gradients(sharding, lm, want)


VISION = VisionConfig(ViTConfig(16, 8, 8, 2, 2, 16), ImageProcessor(16))


@case(*((family, frozen) for family in CONFIGS for frozen in (False, True)))
def vision_language_models(family: str, frozen: bool) -> None:
    """One sample's image lies across two ranks; nothing is learned from the last rank's part."""
    sharding = shard_over((4, 5, 3))
    vlm = VLM(VLMConfig(CONFIGS[family], (VISION,), ConnectorConfig("mlp"))).double()
    vlm.language_model.requires_grad_(not frozen)
    ids = torch.randint(24, (12,))
    labels = ids.clone()
    ids[2:6], labels[2:6], labels[9:] = IMAGE_TOKEN, IGNORE, IGNORE
    batch = Batch(ids, labels, torch.tensor([0, 8, 12]).int(), (random(1, 3, 16, 16),))
    learned = {n: p for n, p in vlm.named_parameters() if p.requires_grad}
    whole = vlm(batch)
    grads = torch.autograd.grad(whole.loss, list(learned.values()), allow_unused=True)
    with context_parallel(sharding):
        out = vlm(batch)
        loss = out.loss * (out.n_targets / batch.n_targets)
        loss.backward()
    counts, total = torch.tensor(out.n_targets), loss.detach().clone()
    dist.all_reduce(counts)
    dist.all_reduce(total)
    assert int(counts) == whole.n_targets and (sharding.rank < 2 or out.n_targets == 0)
    same("loss", total, whole.loss)
    for (name, p), want in zip(learned.items(), grads, strict=True):
        got = gradient(p)
        dist.all_reduce(got)
        same(f"gradient of {name}", got, torch.zeros_like(p) if want is None else want)


# --- no rank is left waiting ------------------------------------------------------------------------------------


@case(("mamba", 0), ("mamba", 2), ("mamba2", 0), ("mamba2", 2))
def gradients_on_one_rank_alone(family: str, learning: int) -> None:
    """The mixer is frozen, and one rank's part alone needs a gradient, which comes from the others' losses too."""
    sharding = shard_over((4, 5, 3))
    mixer = MIXERS[family]().double().requires_grad_(False)
    x = random(1, 12, 8).requires_grad_()
    (dx,) = torch.autograd.grad((mixer(x) * weighted(x)).sum(), x)
    part = sharding.shard(x.detach()).clone().requires_grad_(sharding.rank == learning)
    for again in (False, True):
        part.grad = None
        with context_parallel(sharding):
            y = checkpoint(mixer, part, use_reentrant=False) if again else mixer(part)
            (y * sharding.shard(weighted(x))).sum().backward()
        if sharding.rank == learning:
            same("gradient of x", part.grad, sharding.shard(dx))


@case(("mamba",), ("mamba2",))
def a_rank_that_has_no_loss(family: str) -> None:
    sharding = shard_over((4, 5, 3))
    mixer = MIXERS[family]().double()
    x = random(1, 12, 8).requires_grad_()
    weights = weighted(x)
    weights[:, :9] = 0
    (dx,) = torch.autograd.grad((mixer(x) * weights).sum(), x)
    part = sharding.shard(x.detach()).clone().requires_grad_()
    with context_parallel(sharding):
        (mixer(part) * sharding.shard(weights)).sum().backward()
    same("gradient of x", part.grad, sharding.shard(dx))


@case(("mamba",), ("mamba2",))
def computing_again_outside_of_the_context_is_an_error(family: str) -> None:
    sharding = shard_over((4, 5, 3))
    mixer = MIXERS[family]()
    with context_parallel(sharding):
        y = checkpoint(mixer, torch.randn(1, sharding.lengths[sharding.rank], 8), use_reentrant=False)
    with pytest.raises(RuntimeError, match="(?i)checkpoint|saved"):
        y.sum().backward()


# --- volume and errors ------------------------------------------------------------------------------------------


class Counter:
    """Bytes that this rank sends to others."""

    def __enter__(self) -> Counter:
        self.sent, self.calls = 0, []
        self.real = dist.all_gather, dist.all_to_all_single

        def gather(out, message, group=None):
            self.calls.append("all_gather")
            self.sent += message.nbytes * (dist.get_world_size(group) - 1)
            return self.real[0](out, message, group=group)

        def to_all(out, messages, group=None):
            world = dist.get_world_size(group)
            self.calls.append("all_to_all")
            self.sent += messages.nbytes // world * (world - 1)
            return self.real[1](out, messages, group=group)

        dist.all_gather, dist.all_to_all_single = gather, to_all
        return self

    def __exit__(self, *exc) -> None:
        dist.all_gather, dist.all_to_all_single = self.real


@case(*((family, dtype, n) for family in MIXERS for dtype in ("float32", "bfloat16", "float64") for n in (12, 48)))
def volume(family: str, dtype: str, length: int) -> None:
    """The formulas of `ssm_kernels.context_parallel`, whatever the length."""
    sharding, batch = SequenceSharding.even(length), 2
    dtype = getattr(torch, dtype)
    mixer = MIXERS[family]().to(dtype)
    n, k = mixer.d_state, mixer.conv1d.weight.shape[2]
    if family == "mamba":
        state, channels = mixer.d_inner * (n + 1), mixer.d_inner
    else:
        state, channels = mixer.nheads * (mixer.headdim * n + 1), mixer.d_conv_channels
    size = 8 if dtype == torch.float64 else 4
    formula = (WORLD - 1) * batch * (state * size + (k - 1) * channels * dtype.itemsize)
    with context_parallel(sharding), Counter() as counter:
        y = mixer(sharding.shard(torch.randn(batch, length, 8, dtype=dtype)))
        assert counter.sent == formula and counter.calls == ["all_gather"] * 2
        y.sum().backward()
    assert counter.sent == 2 * formula and counter.calls[2:] == ["all_to_all"] * 2


@case()
def errors() -> None:
    sharding = shard_over((4, 5, 3))
    n = sharding.lengths[sharding.rank]
    with pytest.raises(ValueError, match=r"lengths must be 3 integers from 0 up.*\(4, 5\)"):
        SequenceSharding((4, 5))
    with pytest.raises(ValueError, match="lengths must be 3 integers"):
        SequenceSharding((4, -5, 3))
    conv_weight = torch.randn(4, 4)
    with context_parallel(sharding):
        with pytest.raises(ValueError, match=f"x must have this rank's {n} steps"):
            causal_conv1d(torch.randn(1, 9, 4), conv_weight)
        with pytest.raises(ValueError, match=f"u must have this rank's {n} steps"):
            selective_scan(*[torch.randn(1, 9, 4)] * 2, -torch.ones(4, 3), *[torch.randn(1, 9, 3)] * 2)
        with pytest.raises(ValueError, match="cu_seqlens must run from 0 to L = 12"):
            causal_conv1d(torch.randn(1, n, 4), conv_weight, cu_seqlens=torch.tensor([0, n]))
        with pytest.raises(ValueError, match="initial_states"):
            causal_conv1d(torch.randn(1, n, 4), conv_weight, initial_states=torch.randn(2, 3, 4))
        with pytest.raises(ValueError, match="seq_idx must be None within context_parallel"):
            causal_conv1d(torch.randn(1, n, 4), conv_weight, seq_idx=torch.zeros(1, n, dtype=torch.int32))
    with pytest.raises(ValueError, match="full must have length 12 along dim 1"):
        sharding.shard(torch.randn(1, 13))
    with pytest.raises(TypeError, match="sharding must be a SequenceSharding, got tuple"):
        with context_parallel((4, 5, 3)):
            pass


# --- processes --------------------------------------------------------------------------------------------------


def work(rank: int, folder: Path) -> None:
    """Run every case as one rank, and write what went wrong."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120)
    )
    GROUPS.update({WORLD: None, 2: dist.new_group([0, 1])})
    failures: dict[str, str | None] = {}
    for name, run in CASES.items():
        torch.manual_seed(0)
        try:
            run()
            failures[name] = None
        except Exception:
            failures[name] = traceback.format_exc()
            break  # the others then fail too, since this rank is gone
    (folder / f"{rank}.json").write_text(json.dumps(failures))


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> Iterator[list[dict]]:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(r), str(folder)], stderr=subprocess.PIPE, text=True)
        for r in range(WORLD)
    ]
    try:
        said = [r.communicate(timeout=300)[1] for r in ranks]
    finally:
        for r in ranks:
            r.kill()
    files = [folder / f"{r}.json" for r in range(WORLD)]
    assert all(f.exists() for f in files), "\n".join(said)
    yield [json.loads(f.read_text()) for f in files]


@pytest.mark.parametrize("name", CASES)
def test_equals_one_rank(name, failures):
    said = [found.get(name, "did not get so far") for found in failures]
    assert not any(said), "\n".join(f"rank {r}: {s}" for r, s in enumerate(said))


def test_ranks_are_needed():
    with pytest.raises(RuntimeError, match="init_process_group first"):
        SequenceSharding.even(12)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
