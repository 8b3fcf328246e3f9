"""`ssm-bench state-formats`: the error of a state kept in each format, over many decoding steps.

The steps are those of one layer with the decay rates and step sizes that Mamba and Mamba-2 are initialized with:
A = -1, ..., -16 in Mamba, uniform from -16 to -1 in Mamba-2, and dt from 0.001 to 0.1 (log-uniform over the heads or
channels), with noise of half a unit before softplus. The input of Mamba, and in Mamba-2 B and C too, come from a SiLU,
as in the mixers. Tokens are all different, or one that is repeated, as it is in a silence: there the state nears its
limit by ever smaller steps. The state after the same steps in float64 is the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_kernels import decode_state, encode_state, selective_scan_step, ssd_step

from .environment import environment
from .files import write_json
from .options import StateFormats

Tokens = Literal["varied", "repeated"]
HEADS, HEADDIM, D_STATE = 8, 8, 64
CHANNELS, D_STATE_1 = 64, 16


class Format(NamedTuple):
    """A format of a state, and how it is rounded."""

    dtype: torch.dtype
    stochastic: bool = False

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            return name
        return f"{name}, {'stochastic' if self.stochastic else 'to the nearest'}"


FORMATS = (
    Format(torch.float32),
    *(Format(dtype, chance) for dtype in (torch.bfloat16, torch.float16, torch.int8) for chance in (False, True)),
)


class Steps(NamedTuple):
    """The decoding steps of a layer."""

    op: Callable[..., Tensor]
    shape: tuple[int, ...]
    """Shape of a state."""
    layer: dict[str, Tensor]
    tokens: dict[str, tuple[int, ...]]
    """Shapes of the inputs of a token, which are drawn from a normal distribution."""
    activated: tuple[str, ...]
    """Names of the inputs that pass through a SiLU."""

    def inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the inputs of a token, in float64."""
        drawn = {name: torch.randn(1, *size, generator=generator).double() for name, size in self.tokens.items()}
        activated = {name: F.silu(drawn[name]) for name in self.activated}
        return drawn | activated | {"dt": drawn["dt"] / 2}


def layer_steps(op: str, generator: torch.Generator) -> Steps:
    """Return the steps of a layer of Mamba (`selective_scan_step`) or Mamba-2 (`ssd_step`), with rates in float64."""

    def dt_bias(n: int) -> Tensor:
        dt = torch.logspace(math.log10(1e-3), math.log10(0.1), n, dtype=torch.float64)
        return dt.expm1().log()  # softplus of it is dt

    if op == "ssd_step":
        A = -1 - 15 * torch.rand(HEADS, generator=generator).double()
        tokens = {"x": (HEADS, HEADDIM), "dt": (HEADS,), "B": (1, D_STATE), "C": (1, D_STATE)}
        return Steps(
            ssd_step, (1, HEADS, HEADDIM, D_STATE), {"A": A, "dt_bias": dt_bias(HEADS)}, tokens, ("x", "B", "C")
        )
    A = -torch.arange(1.0, D_STATE_1 + 1).double().repeat(CHANNELS, 1)
    tokens = {"u": (CHANNELS,), "dt": (CHANNELS,), "B": (1, D_STATE_1), "C": (1, D_STATE_1)}
    return Steps(selective_scan_step, (1, CHANNELS, D_STATE_1), {"A": A, "dt_bias": dt_bias(CHANNELS)}, tokens, ("u",))


@dataclass(frozen=True)
class Row:
    """Error of one format."""

    op: str
    tokens: Tokens
    format: str
    bytes: float
    """Size of an element of the state, with its share of a scale."""
    output: float
    """Root mean square of the error of y in the last tenth of the steps, relative to that of y."""
    state: float
    """Root mean square of the error of the state after the last step, relative to that of the state."""


def measure(op: str, tokens: Tokens, steps: int, seed: int) -> Iterator[Row]:
    """Measure the error of every format in the steps of an op."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer_steps(op, generator)
    exact = torch.zeros(layer.shape, dtype=torch.float64)
    zeros = exact.float()
    stored = [(zeros.clone(), None) if f.dtype == torch.float32 else encode_state(zeros, f.dtype) for f in FORMATS]
    of_exact, of_error = 0.0, [0.0] * len(FORMATS)
    single = {name: t.float() for name, t in layer.layer.items()}
    inputs = layer.inputs(generator)
    for step in range(steps):
        if tokens == "varied":
            inputs = layer.inputs(generator)
        want = layer.op(exact, **inputs, **layer.layer, dt_softplus=True)
        rounded = {name: t.float() for name, t in inputs.items()}
        seeds = torch.tensor([step])
        counts = step >= steps - steps // 10
        of_exact += counts * float(want.square().sum())
        for i, (f, (state, scale)) in enumerate(zip(FORMATS, stored, strict=True)):
            y = layer.op(
                state,
                **rounded,
                **single,
                dt_softplus=True,
                state_scale=scale,
                rand_seed=seeds if f.stochastic else None,
            )
            of_error[i] += counts * float((y - want).square().sum())
    for f, (state, scale), error in zip(FORMATS, stored, of_error, strict=True):
        difference = (decode_state(state, scale) - exact).square().mean() / exact.square().mean()
        size = state.element_size() + (0 if scale is None else scale.element_size() / layer.shape[-1])
        yield Row(op, tokens, str(f), size, math.sqrt(error / max(of_exact, 1e-300)), math.sqrt(float(difference)))


def run_state_formats(command: StateFormats) -> None:
    """`ssm-bench state-formats`."""
    rows = [
        row
        for op in ("selective_scan_step", "ssd_step")
        for tokens in get_args(Tokens)
        for row in measure(op, tokens, command.steps, command.seed)
    ]
    print("| op | tokens | state | bytes an element | error of y | error of the state |\n|---|---|---|---|---|---|")
    for row in rows:
        errors = f"{100 * row.output:.2g} % | {100 * row.state:.2g} %"
        print(f"| {row.op} | {row.tokens} | {row.format} | {row.bytes:g} | {errors} |")
    write_json(command.out, {"steps": command.steps, "rows": [asdict(row) for row in rows], **environment()})
