"""Decoding: one token per sequence and step, on memory that stays at one address."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ssm_kernels import resolve_backend, states

from .config import StateDtype
from .cuda_graph import capture, graph_key, has_graphs, warm_up, warn_once
from .interface import LanguageModel, LMState

logger = logging.getLogger(__name__)

MAX_FUSED_BATCH = 8
"""Sequences up to which a fused step is faster than one op by op: matrix products of so few rows are slow."""
MAX_FUSED_WORK = 1 << 25
"""Product of sequences and weights up to which a fused step is faster whatever the batch: of a small model, the ops
themselves take most of the time."""


class Decoder:
    """Advance sequences by one token each; call with the last tokens (S,), returns logits (S, V).

    State, tokens and (in a graph) logits keep their addresses. On a GPU, the first steps of a batch size are the
    warm-up; then a step is captured in a CUDA graph, one per batch size, and replayed. No step synchronizes the host
    with the device. Where capture fails, the reason is logged once and steps run eagerly.

    On a CPU with numba, a step of a few sequences is one compiled kernel (`LanguageModel.fuse_step`), unless the model
    has something that it would bypass; the reason is then logged once, at level INFO. The model is
    looked at when a generation starts, and again when weights have moved.

    Follows the rules of `torch.cuda.graphs`: warm-up on a side stream, static memory, no read by the host. Not run on
    a GPU; tests on a CPU check that addresses stay and that nothing is read.

    Args:
        lm: language model; held by a weak reference.
        batch: most sequences at once.
        state_dtype: format of the state, as in `GenerationConfig`.
    """

    WARM_UP = 3
    """Steps before capture. They are steps of the generated text, so that a short text never pays for a capture."""

    def __init__(self, lm: LanguageModel, batch: int, state_dtype: StateDtype = "float32"):
        self.lm = weakref.proxy(lm)
        self.state_dtype: StateDtype = state_dtype
        with torch.inference_mode(False):  # a state made in inference mode could not be updated outside of it
            self.buffers = lm.new_state(batch, narrow_dtype(state_dtype))
            self.device = lm.device
            self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)  # (batch, 1)
        self.graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        # No graph spans several devices. Under autocast, cast copies of the weights do not last until a replay.
        self.may_capture = (
            has_graphs(self.device)
            and all(layer.ssm.device == self.device for layer in self.buffers)
            and not torch.is_autocast_enabled("cuda")
        )
        self.graph_key = graph_key(lm, self.device)
        self.n_weights = sum(t.numel() for t in (*lm.parameters(), *lm.buffers()))
        self.forget_fused_steps()
        self.set_batch(batch)

    def set_batch(self, batch: int) -> None:
        """Use the first `batch` rows of the buffers, with their current contents."""
        self.batch, self.steps = batch, 0
        self.state: LMState = states.select(self.buffers, slice(batch))

    def forget_fused_steps(self) -> None:
        """Look again, at the next step, at whether the model allows fused steps: it may have changed."""
        self.fused: dict[int, Callable[[Tensor], Tensor | None]] = {}
        """Fused steps by batch size."""
        self.may_fuse = self.device.type == "cpu" and narrow_dtype(self.state_dtype) is None

    def reset(self) -> None:
        """Zero the state: all sequences are empty."""
        for layer in self.state:
            for t in layer:
                t.zero_()

    def select(self, rows: Tensor) -> None:
        """Continue with these rows only; they move to the front of the buffers."""
        for layer in self.state:
            for t in layer:
                t[: len(rows)] = t[rows.to(t.device)]
        self.set_batch(len(rows))

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Advance each sequence by its token (S,). The returned logits (S, V) are valid until the next step."""
        self.tokens[: self.batch, 0].copy_(tokens)
        if self.may_capture and self.steps == self.WARM_UP and self.batch not in self.graphs:
            try:
                self.graphs[self.batch] = capture(self.step, self.device)
            except RuntimeError as e:
                self.may_capture = False
                warn_once(f"decoding runs without a CUDA graph, since capture failed: {e}")
        # Eager steps until the graph exists, replays afterwards.
        if self.batch in self.graphs:
            replay, logits = self.graphs[self.batch]
            replay()
            return logits
        self.steps += 1
        # Warm-up steps count towards the generated text.
        return warm_up(self.step, self.device) if self.may_capture else self.step()

    def step(self) -> Tensor:
        """Run one step on the buffers: the function that is captured."""
        tokens = self.tokens[: self.batch]  # (S, 1)
        if self.may_fuse and pays_to_fuse(self.batch, self.n_weights, self.device):
            logits = self.fused_step(tokens)  # (S, V)
            if logits is not None:
                return logits
        return self.lm(tokens, state=self.state).logits[:, 0]  # (S, V)

    def fused_step(self, tokens: Tensor) -> Tensor | None:
        """Run one step by one kernel: tokens (S, 1) -> logits (S, V). None where backend or model do not allow it."""
        if resolve_backend("auto", self.device, "ssd") != "numba":
            return None
        embeds = self.lm.embed(tokens)[:, 0]  # (S, D)
        if self.batch in self.fused:
            logits = self.fused[self.batch](embeds)
            if logits is not None:
                return logits
            self.fused.clear()
        # At the first step of a batch size, and after a weight has moved: the model may have become another one.
        obstacle = self.lm.obstacle_to_fusing()
        if obstacle is not None:
            self.may_fuse = False
            log_once(f"decoding runs op by op: {obstacle}")
            return None
        step = self.fused[self.batch] = self.lm.fuse_step(self.state)
        return step(embeds)


def pays_to_fuse(rows: int, n_weights: int, device: torch.device) -> bool:
    """Whether a step of so many tokens is faster, and possible, as one kernel, where the model allows it."""
    return (
        (rows <= MAX_FUSED_BATCH or rows * n_weights <= MAX_FUSED_WORK)
        and resolve_backend("auto", device, "ssd") == "numba"
        and not torch.is_autocast_enabled("cpu")
    )


def narrow_dtype(state_dtype: StateDtype) -> torch.dtype | None:
    """Return the dtype that `LanguageModel.new_state` takes for a format; None for the model's own."""
    return None if state_dtype == "float32" else getattr(torch, state_dtype)


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Log a message at level INFO the first time that it occurs in this process."""
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


# The last decoder of each model, with its graphs. It is removed while in use.
_decoders: weakref.WeakKeyDictionary[LanguageModel, Decoder] = weakref.WeakKeyDictionary()


def acquire_decoder(lm: LanguageModel, batch: int, state_dtype: StateDtype) -> Decoder:
    """Take the model's cached decoder where it fits, or make one. Its state is reset."""
    # Two generators at once must not share buffers.
    decoder = _decoders.pop(lm, None)
    key = (graph_key(lm, lm.device), state_dtype)
    if decoder is None or len(decoder.tokens) < batch or (decoder.graph_key, decoder.state_dtype) != key:
        decoder = Decoder(lm, batch, state_dtype)
    decoder.set_batch(batch)
    decoder.reset()
    return decoder


def release_decoder(lm: LanguageModel, decoder: Decoder) -> None:
    """Cache a decoder for the next caller, if it may hold graphs."""
    if has_graphs(decoder.device):
        _decoders[lm] = decoder


def state_bytes(state: LMState) -> int:
    """Size of a state in bytes. It does not depend on the length of the sequences."""
    return sum(t.numel() * t.element_size() for layer in state for t in layer)
