"""One point of `ssm-bench prefill` or `decode`: a model at a batch and a context, its check, time and memory."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...model.quantize import Quantization
from .. import memory
from ..cases import DTYPES
from ..environment import synchronize
from ..options import Size
from ..processor import measure_rates
from .models import PREFILL_CHUNK, InferenceModel, build
from .specs import SPECS, VLMSpec, grid_tokens, spec_of

ROUNDS = 3
WARM_UP = 5
"""Steps before those that are timed; on a GPU they capture the graph."""
CHECKED_STEPS = 6
ALLOWED = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 16, torch.float16: 16}
"""Roundings by which a step's logits may differ from the prompt's, relative to the largest logit.

A deep model in a half type rounds its activations in every layer; one in float32 also sums in another order.
"""
ALLOWED_OF_INTEGERS = 16 * 2**-15
"""The same where weights are quantized: a step rounds the vectors that it multiplies by them to 16 bits."""
MEMORY_SHARE = 0.9
"""Share of the free memory that a point may need."""


@dataclass(frozen=True)
class Point:
    """A model at a batch and a context."""

    phase: Literal["prefill", "decode"]
    size: Size
    model: str
    batch: int
    context: int
    dtype: str
    device: str
    steps: int
    """Timed steps of decode."""
    max_tokens: int
    """Longest sequence for which the model is built."""
    parameters: int
    chunk: int = PREFILL_CHUNK
    """Tokens of a prompt that run at once."""

    @property
    def spec(self) -> VLMSpec:
        return spec_of(self.size, self.model)[0]

    @property
    def quantize(self) -> Quantization | None:
        return spec_of(self.size, self.model)[1]

    @property
    def tokens(self) -> int:
        """Tokens that the language model has read at the end of a prompt, or before the first step."""
        if self.phase == "decode":
            return self.context
        return self.context - grid_tokens(self.size) + self.spec.image_tokens

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence of the measurement."""
        return self.tokens + (WARM_UP + self.steps if self.phase == "decode" else 1)

    @property
    def steps_per_round(self) -> int:
        return -(-self.steps // ROUNDS)

    @property
    def type(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def work(self) -> float:
        """Operations or bytes; the time is predicted in proportion to them."""
        if self.phase == "prefill":
            return self.spec.prompt_work(self.tokens, self.batch)
        return self.spec.step_work(self.context, self.batch, self.type, self.parameters)

    @property
    def bytes_needed(self) -> int:
        """Upper estimate of the memory of weights, state, mask and activations."""
        itemsize, is_ours = self.type.itemsize, self.spec.is_ours
        state = self.batch * self.spec.state_bytes(self.capacity, self.type)
        at_once = min(self.chunk, self.tokens) if self.phase == "prefill" else 1
        rows = 1 if is_ours and self.phase == "prefill" else self.batch  # our prompts run packed
        has_mask = not is_ours and at_once not in (1, self.tokens)
        mask = at_once * self.capacity * (1 + itemsize) if has_mask else 0
        return self.parameters * itemsize + state + mask + self.spec.activation_bytes(at_once, rows, self.type)

    def fitted(self) -> Point | str:
        """The point as it fits in memory, with prefill chunks where needed, or the reason why it does not."""
        available = int(MEMORY_SHARE * memory.free_memory(self.device))
        is_splittable = self.phase == "prefill" and not self.spec.is_ours
        needed = 0
        for chunk in (self.tokens, PREFILL_CHUNK) if is_splittable else (PREFILL_CHUNK,):
            point = dataclasses.replace(self, chunk=chunk)
            needed = point.bytes_needed
            if needed <= available:
                return point
        return f"does not fit: needs about {needed / 2**30:,.1f} GiB, and {available / 2**30:,.1f} GiB may be taken"


def run_once(model: InferenceModel, point: Point) -> dict[str, Any]:
    """One turn of a model: seconds of each call, bytes of state per sequence, and on a GPU the peak memory."""
    before = 0
    if point.device != "cpu":
        torch.cuda.reset_peak_memory_stats(point.device)
        before = torch.cuda.memory_allocated(point.device)
    try:
        found = _RUN[point.phase](model, point) | {"state_bytes": model.state_bytes(point.tokens) // point.batch}
    finally:
        model.release()
    if point.device != "cpu":
        found["peak_memory"] = torch.cuda.max_memory_allocated(point.device) - before
    return found


def _run_prompt(model: InferenceModel, point: Point) -> dict[str, Any]:
    """Time from images to a token, after a small prompt that compiles and allocates."""
    text = random_text(point, point.batch, point.tokens - point.spec.image_tokens)  # (B, L)
    images = model.images(point.batch)
    few = min(point.tokens, point.spec.image_tokens + 8)
    model.allocate(point.batch, point.capacity)
    model.prefill(model.prompt(model.encode(images), text), few, point.chunk).argmax(-1)
    synchronize(point.device)
    start, processor_start = time.perf_counter(), time.process_time()
    features = model.encode(images)  # (B, image tokens, D)
    synchronize(point.device)
    encoded = time.perf_counter()
    model.prefill(model.prompt(features, text), point.tokens, point.chunk).argmax(-1)
    synchronize(point.device)
    seconds, processor_seconds = [time.perf_counter() - start], [time.process_time() - processor_start]
    return {"seconds": seconds, "core_seconds": _of_cores(seconds, processor_seconds), "encode": encoded - start}


def _run_steps(model: InferenceModel, point: Point) -> dict[str, Any]:
    """Times of decoding steps, each of which takes the token that the one before chose."""
    model.allocate(point.batch, point.capacity)
    model.fill(point.context)
    tokens = random_text(point, point.batch, 1)[:, 0]  # (B,)
    seconds, processor_seconds = [], []
    for i in range(WARM_UP + point.steps_per_round):
        synchronize(point.device)
        start, processor_start = time.perf_counter(), time.process_time()
        tokens = model.step(tokens).argmax(-1)  # (B, V) -> (B,)
        synchronize(point.device)
        if i >= WARM_UP:
            seconds.append(time.perf_counter() - start)
            processor_seconds.append(time.process_time() - processor_start)
    return {"seconds": seconds, "core_seconds": _of_cores(seconds, processor_seconds)}


def _of_cores(seconds: list[float], processor_seconds: list[float]) -> list[float]:
    """Times as the bandwidth is measured: that of one core by its processor time, that of several by the clock."""
    return processor_seconds if torch.get_num_threads() == 1 else seconds


def bandwidth_share(n_bytes: int, seconds: float) -> float:
    """Share of the cores' measured read bandwidth that reading so many bytes in this time makes use of."""
    rates = measure_rates(torch.get_num_threads())
    return n_bytes / seconds / rates.read[max(rates.read)]


_RUN = {"prefill": _run_prompt, "decode": _run_steps}


def random_text(point: Point, batch: int, n: int) -> torch.Tensor:
    """Random tokens (B, n), the same for every model, within the smallest vocabulary."""
    smallest = min(spec.vocab_size for spec in SPECS[point.size].values())
    drawn = torch.randint(smallest, (batch, n), generator=torch.Generator().manual_seed(1))
    return drawn.to(point.device)


def check(model: InferenceModel, point: Point) -> tuple[dict[str, Any], float, float]:
    """Compare steps with prompts of the same tokens, and a prompt in prefill chunks with an unsplit one.

    Returns:
        The result of the check; seconds of such a prompt or step; and its work, as of `Point.work`.
    """
    batch, extra = 2, 16
    n = point.spec.image_tokens + extra
    model.allocate(batch, n + CHECKED_STEPS)
    text = random_text(point, batch, extra + CHECKED_STEPS)
    prompt = model.prompt(model.encode(model.images(batch)), text)
    unsplit = (n + CHECKED_STEPS) * batch  # a prefill chunk of all packed prompts
    # Logits (B, V) after n, n + 1, ... tokens, each by a prompt of its own.
    expected = [model.prefill(prompt, n + i, unsplit).clone() for i in range(CHECKED_STEPS + 1)]
    start = time.perf_counter()
    found = [model.prefill(prompt, n, n // 2 + 1).clone()]
    synchronize(point.device)
    seconds, work = time.perf_counter() - start, point.spec.prompt_work(n, batch)
    for i in range(CHECKED_STEPS):
        synchronize(point.device)
        start = time.perf_counter()
        found.append(model.step(text[:, extra + i]).clone())
        synchronize(point.device)
    if point.phase == "decode":
        seconds, work = time.perf_counter() - start, point.spec.step_work(n, batch, point.type, point.parameters)
    # torch's max propagates NaN, Python's does not.
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    error = torch.stack(errors).max().item()
    allowed = ALLOWED[point.type] * torch.finfo(point.type).eps
    if point.quantize is not None:
        allowed = max(allowed, ALLOWED_OF_INTEGERS)
    return {"error": error, "allowed": allowed, "is_right": error <= allowed}, seconds, work


def peak_memory(point: Point) -> int:
    """Bytes by which a call raises a fresh process's resident memory above that with the weights (Linux).

    Raises:
        MemoryError: the operating system killed the process.
        RuntimeError: the call failed.
    """
    return memory.in_fresh_process(_peak_memory_here, point)


def _peak_memory_here(point: Point) -> int:
    with torch.inference_mode():
        model = build(point.spec, point.type, point.device, point.max_tokens, quantize=point.quantize)
        # A small call first: memory that libraries allocate once is not the call's.
        few = grid_tokens(point.size) + 8
        run_once(model, dataclasses.replace(point, context=few, batch=1, steps=1))
        return memory.peak_resident(lambda: _RUN[point.phase](model, point))
