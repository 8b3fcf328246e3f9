"""States in bfloat16, float16 and int8: rounding to the nearest and stochastic rounding, the same on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_kernels import (
    Mamba3States,
    StateSlots,
    causal_conv1d_step,
    decode_state,
    encode_state,
    mamba3_step,
    selective_scan_step,
    ssd_step,
)
from ssm_kernels._core import state_format, state_format_reference
from ssm_kernels.testing import is_interpreted
from vlmamba.benchmarks.state_formats import measure

pytestmark = pytest.mark.triton
NARROW = pytest.mark.parametrize("dtype", state_format.NARROW_DTYPES, ids=str)
HEADS, HEADDIM, N = 2, 5, 20


@pytest.fixture(scope="module", params=["triton"] if is_interpreted() else ["torch", "numba", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbors in a format at each value (..., N), at least."""
    if dtype == torch.int8:
        return values.abs().amax(-1, keepdim=True) / 127
    bits, least = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    return 2.0 ** (values.abs().log2().floor().clamp(min=least) - bits + 1)


# --- the format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)  # fmt: skip
def test_philox_has_the_known_answers_of_random123(counter, key, words):
    assert state_format_reference.philox(counter, key) == words


def test_the_bits_are_those_of_the_reference():
    seeds = torch.tensor([0, -3, (1 << 40) + 7])
    bits = state_format.random_bits(seeds, 3, 13)
    for seed, got in zip(seeds.tolist(), bits, strict=True):
        assert got.tolist() == state_format_reference.random_bits(seed, 3, 13).tolist()


@NARROW
@pytest.mark.parametrize("seed", [None, 11])
def test_any_number_is_rounded_as_the_reference_does(dtype, seed):
    values = draw(64, 4, 13) * 10.0 ** torch.randint(-9, 6, (64, 4, 13), generator=torch.Generator().manual_seed(1))
    values[0, 0, 0], values[0, 1, 3], values[1, 2, 3], values[2, 0] = 0, torch.inf, torch.nan, 1e-40
    values[3, 0, :3] = torch.tensor([65519.0, -65521.0, 3.4e38])
    stored, scale = encode_state(values, dtype, None if seed is None else torch.full((64,), seed))
    got = decode_state(stored, scale)
    for i in range(64):
        want, scales = torch.empty(4, 13, dtype=dtype), torch.empty(4) if dtype == torch.int8 else None
        state_format_reference.store(want, scales, values[i], seed)
        torch.testing.assert_close(
            got[i], state_format_reference.decode(want, scales), rtol=0, atol=0, equal_nan=True, msg=f"state {i}"
        )


@NARROW
def test_stochastic_rounding_keeps_the_mean(dtype):
    values = draw(1, 3, 16).expand(4000, -1, -1)
    seeds = torch.arange(4000)
    got = decode_state(*encode_state(values, dtype, seeds))
    unit_size = unit(values[0], dtype)
    assert ((got - values).abs() <= unit_size * (1 + 1e-6)).all()
    # The deviation of the mean of 4000 is at most half a unit by sqrt(4000).
    assert ((got.double().mean(0) - values[0]).abs() < 5 * unit_size / 2 / 4000**0.5).all()


# --- steps ----------------------------------------------------------------------------------------------------------


class Steps:
    """Steps of an op on a pool of six states of a format."""

    def __init__(self, op: str, n_tokens: int, dtype: torch.dtype, exact: bool = False):
        def some(*shape: int, seed: int = 0) -> Tensor:
            return draw(*shape, seed=seed).mul(4).round() if exact else draw(*shape, seed=seed)

        m, self.name = n_tokens, op
        if op == "selective_scan":
            rows: tuple[int, ...] = (70,)
            self.tokens = {"u": some(m, 70), "dt": some(m, 70, seed=1), "B": some(m, 2, N), "C": some(m, 2, N)}
            self.layer: dict[str, Any] = {"A": -draw(70, N).exp()}
            self.op = selective_scan_step
        elif op == "ssd":
            rows = (HEADS, HEADDIM)
            self.tokens = {"x": some(m, *rows), "dt": some(m, HEADS), "B": some(m, 1, N), "C": some(m, 1, N)}
            self.layer = {"A": -draw(HEADS).exp()}
            self.op = ssd_step
        else:
            rows = (HEADS, HEADDIM)
            self.tokens = {"x": some(m, *rows), "dt": draw(m, HEADS).abs(), "A": -draw(m, HEADS).abs()}
            self.tokens |= {"B": some(m, 1, N), "C": some(m, 1, N), "trap": draw(m, HEADS), "angles": draw(m, 3)}
            self.layer = {}
            self.op = mamba3_step
        if op != "mamba3":
            self.layer["dt_softplus"] = not exact
        if exact:  # what the step computes is exact in float32, in any order
            self.tokens["dt"] = torch.ones_like(self.tokens["dt"]) / 4
            self.layer["A"] = torch.zeros_like(self.layer["A"])
        values = some(6, *rows, N, seed=5).float()
        self.state, self.scale = encode_state(values, dtype, None)
        self.others = (draw(6, HEADS, 3).abs(), draw(6, 1, HEADS, N), draw(6, HEADS, HEADDIM))

    def run(self, backend: str, tokens: dict[str, Tensor] | None = None, n: int | None = None, **options):
        """Run the tokens on a copy of the states, of the first n; return y and the copies."""
        state, *others = (t[:n].clone() for t in (self.state, *self.others))
        scale = None if self.scale is None else self.scale[:n].clone()
        states = state if self.name != "mamba3" else Mamba3States(others[0], state, others[1], others[2])
        y = self.op(
            states, **(tokens or self.tokens), **self.layer, state_scale=scale, backend=backend, **options
        )  # fmt: skip
        return y, state, scale


OPS = pytest.mark.parametrize("op", ["selective_scan", "ssd", "mamba3"])


@NARROW
@pytest.mark.parametrize("op", ["selective_scan", "ssd"])
def test_a_seed_gives_the_same_bits_on_every_backend(backend, op, dtype):
    steps = Steps(op, 3, dtype, exact=True)
    if dtype == torch.int8:  # whole numbers, of which the largest is a power of two: rounded by the last division alone
        assert steps.scale is not None
        steps.state.clamp_(-100, 100)
        steps.scale.fill_(1.0)
    seeds = torch.tensor([9, -8, 1 << 35])
    slots = StateSlots(torch.tensor([4, -1, 2]), torch.tensor([1, 3, 2]))
    for options in ({"n": 3}, {"slots": slots}):
        _, state, scale = steps.run(backend, rand_seed=seeds, **options)
        _, want, scales = steps.run("reference", rand_seed=seeds, **options)
        assert torch.equal(state, want)
        assert scale is scales is None or torch.equal(scale, scales)


@NARROW
@OPS
@pytest.mark.parametrize("seed", [None, 3])
def test_a_step_on_a_narrow_state_agrees_with_the_reference(backend, op, dtype, seed):
    if is_interpreted() and dtype == torch.bfloat16 and seed is None:
        pytest.skip("the interpreter cuts the bits of bfloat16 where a GPU rounds")
    steps = Steps(op, 6, dtype)
    tokens = {name: x.unflatten(0, (2, 3)) for name, x in steps.tokens.items()}
    slots = StateSlots(torch.tensor([2, 1]), torch.tensor([[5, 2, 0], [-1, 3, 4]]))
    options = {"slots": slots, "rand_seed": None if seed is None else torch.tensor([seed])}
    y, state, scale = steps.run(backend, tokens, **options)
    want_y, want, scales = steps.run("reference", tokens, **options)
    got, values = decode_state(state, scale), decode_state(want, scales)
    # A last bit of the computation may decide a rounding, and the next tokens start from there.
    is_same = (got - values).abs() <= unit(values, dtype) * 1e-3
    assert is_same.float().mean() > 0.99
    assert ((got - values).abs() <= unit(values, dtype) * (1 + 1e-3) + 1e-5).float().mean() > 0.999
    torch.testing.assert_close(y, want_y, rtol=2e-2, atol=2e-2 * float(want_y.abs().max()))


@NARROW
@OPS
def test_tokens_at_once_are_single_steps_where_every_state_is_kept(backend, op, dtype):
    steps = Steps(op, 3, dtype)
    after_each = torch.tensor([[3, 4, 5]])
    tokens = {name: x.unsqueeze(0) for name, x in steps.tokens.items()}
    y, state, scale = steps.run(
        backend, tokens, slots=StateSlots(torch.tensor([1]), after_each), rand_seed=torch.tensor([7])
    )
    single = Steps(op, 3, dtype)
    for t, (source, out) in enumerate(((1, 3), (3, 4), (4, 5))):
        token = {name: x[t : t + 1] for name, x in steps.tokens.items()}
        slots = StateSlots(torch.tensor([source]), torch.tensor([out]))
        copies = Mamba3States(single.others[0], single.state, single.others[1], single.others[2])
        states = copies if op == "mamba3" else single.state
        single.op(
            states, **token, **single.layer, state_scale=single.scale, backend=backend, slots=slots,
            rand_seed=torch.tensor([7 + t]),
        )  # fmt: skip
    # Mamba-3's angles are a sum from the first token on; the reference computes the step sizes of all tokens at once.
    if op == "mamba3" or backend == "reference":
        got, want = (decode_state(s, f) for s, f in ((state, scale), (single.state, single.scale)))
        assert ((got - want).abs() <= 2 * unit(want, dtype)).all()
        return
    assert torch.equal(state, single.state)
    assert scale is None or (single.scale is not None and torch.equal(scale, single.scale))


@pytest.mark.skipif(is_interpreted(), reason="thousands of steps")
@pytest.mark.parametrize("op", ["selective_scan_step", "ssd_step"])
def test_rounding_to_the_nearest_stands_still_and_stochastic_rounding_does_not(op):
    rows = {row.format: row for row in measure(op, "repeated", 800, seed=0)}
    for dtype in ("bfloat16", "float16"):
        nearest, stochastic = rows[f"{dtype}, to the nearest"], rows[f"{dtype}, stochastic"]
        assert stochastic.state < 0.1 * nearest.state
    assert rows["bfloat16, to the nearest"].state > 0.1
    limits = {"float32": 1e-5, "bfloat16, stochastic": 0.01, "float16, stochastic": 0.002, "int8, stochastic": 0.05}
    for name, limit in limits.items():
        assert rows[name].state < limit, name


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options", "error", "message"),
    [
        (torch.int8, {}, ValueError, "state_scale must be given with a state in int8"),
        (torch.bfloat16, {"state_scale": torch.zeros(2, 3)}, ValueError, "state_scale is for a state in int8 alone"),
        (torch.int8, {"state_scale": torch.zeros(2)}, ValueError, r"state_scale must have shape \(2, 3\), got \(2,\)"),
        (torch.int8, {"state_scale": torch.zeros(2, 3).half()}, TypeError, "state_scale must have a dtype among"),
        (torch.float32, {"rand_seed": torch.tensor([1])}, ValueError, "rand_seed is for .*; the state is float32"),
        (torch.float16, {"rand_seed": torch.tensor([1, 2, 3])}, ValueError, r"rand_seed must have shape \(2\), got"),
        (torch.float16, {"rand_seed": torch.tensor([1.0])}, TypeError, "rand_seed must have a dtype among int64"),
        (torch.uint8, {}, TypeError, "state must have a dtype among .*, int8; got uint8"),
    ],
)  # fmt: skip
def test_formats_that_cannot_be_are_refused(dtype, options, error, message):
    x, row = torch.ones(2, 3), torch.ones(2, 1, 4)
    with pytest.raises(error, match=message):
        selective_scan_step(torch.zeros(2, 3, 4, dtype=dtype), x, x, -torch.ones(3, 4), row, row, **options)
    heads = torch.ones(2, 3, 1)
    state = torch.zeros(2, 3, 1, 4, dtype=dtype)
    if "state_scale" in options and options["state_scale"].dim() == 2:
        options = {"state_scale": options["state_scale"].unsqueeze(2)}
        message = message.replace("2, 3", "2, 3, 1")
    message = message.replace(r"shape \(2, 3\)", r"shape \(2, 3, 1\)")
    with pytest.raises(error, match=message):
        ssd_step(state, heads, x, -torch.ones(3), row, row, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_of_the_convolution_leaves_other_slots_as_they_are(backend, dtype):
    """To the bit: a slot may hold anything, such as a NaN whose bits a conversion would change."""
    pool = torch.full((4, 3, 70), 0x7F81 if dtype == torch.bfloat16 else 0x7C01, dtype=torch.int16).view(dtype)
    before = pool.clone()
    x = draw(1, 70).to(dtype)
    pool[2] = 0
    causal_conv1d_step(pool, x, draw(70, 4).to(dtype), slots=StateSlots(torch.tensor([2])), backend=backend)
    assert torch.equal(pool[2, 2], x[0])
    others = [0, 1, 3]
    assert torch.equal(pool[others].view(torch.int16), before[others].view(torch.int16))
