"""State-space models of `transformers` on the ops of this package, on CPUs and GPUs.

.. code-block:: python

    from ssm_kernels.integrations import transformers as on_these_ops

    on_these_ops.enable()  # for models that exist already too
    on_these_ops.disable()

    with on_these_ops.enabled():
        ...

A modeling file of `transformers` 5.23 or 5.24 calls its kernels through functions of the module, each of which wraps
an op of `mamba_ssm` or `causal_conv1d`. `enable` replaces each by this package's op. In a graph that is being exported,
for an activation other than silu, and for a decoding step that needs gradients, the library's own function runs as
before.

**Packed sequences.** No model of the library keeps packed sequences apart by `position_ids` alone: each of
`MODEL_TYPES` runs its scan and its convolution across the bounds, with `enable` and without. With `seq_idx` and
`position_ids` together, Bamba, Falcon-H1, Zamba2 and Nemotron-H keep them apart on these ops (without `mamba_ssm` the
library refuses `seq_idx` there); in GraniteMoeHybrid the attention layers still mix them. `Mamba2ForCausalLM` drops
`seq_idx` silently, `Mamba2Model` takes it. Mamba, Falcon-Mamba and Jamba drop it too, and Zamba refuses it.

**Prefill in chunks.** With a cache and several tokens at once, Mamba, Falcon-Mamba, Jamba and Zamba restart their scan
from a zero state, since its function takes no initial state, and Bamba's logits are wrong too. This is so in the
library itself, and `enable` does not change it. One token at a time is right everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType

from torch import Tensor

from ..compat import mamba_ssm as ops
from ..compat.mamba_ssm._shared import pair, single
from ..layers import needs_gradients, refuse_cu_seqlens


def enable() -> None:
    """Run the models of `MODEL_TYPES` on the ops of this package. A second call has no effect.

    Raises:
        ImportError: `transformers` is not installed.
        RuntimeError: its version calls kernels differently; nothing has been changed.
    """
    if _originals:
        return
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("enable() needs transformers (pip install 'transformers>=5.23')")
    # All functions are looked up before the first is replaced, so that a failure leaves nothing half done.
    found, missing = [], []
    for model_type, replacements in MODEL_TYPES.items():
        name = f"transformers.models.{model_type}.modeling_{model_type}"
        try:
            module = importlib.import_module(name)
        # An older or newer version may have no such model type.
        except ModuleNotFoundError:
            missing.append(name)
            continue
        for function, replacement in replacements.items():
            if callable(getattr(module, function, None)):
                found.append((module, function, replacement))
            else:
                missing.append(f"{name}.{function}")
    if missing:
        version = importlib.import_module("transformers").__version__
        raise RuntimeError(f"enable() is written for transformers 5.23 and 5.24; {version} has no {', '.join(missing)}")
    for module, function, replacement in found:
        original = getattr(module, function)
        _originals.append((module, function, original))
        # With the original's name and signature, for code that inspects either.
        setattr(module, function, functools.wraps(original)(replacement(original)))


def disable() -> None:
    """Restore the library's own functions. Without `enable` before, it has no effect."""
    while _originals:
        setattr(*_originals.pop())


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable` inside the `with` block, and restore the state before it afterwards."""
    # Within an `enable` of the caller's own, nothing is restored on leaving.
    before = bool(_originals)
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


_originals: list[tuple[ModuleType, str, Callable]] = []


def _convolution(original: Callable, *, packs: bool = True) -> Callable:
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        seq_idx: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        # Half of a mixer that keeps sequences apart would be wrong without notice.
        if seq_idx is not None and not packs:
            raise ValueError("seq_idx must be None: this model does not pass it to the scan")
        refuse_cu_seqlens(kwargs)
        if _keeps_original(activation):
            return original(hidden_states, weight, bias, activation, seq_idx=seq_idx, **kwargs)
        # (B, D, L)
        return single(ops.causal_conv1d_fn(hidden_states, weight, bias, seq_idx, activation=activation))

    return causal_conv1d_fn


def _convolution_step(original: Callable) -> Callable:
    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        if _keeps_original(activation) or needs_gradients(hidden_states, conv_state, weight, bias):
            # The library's own step is differentiable, and takes other activations.
            return original(hidden_states, conv_state, weight, bias, activation)
        return ops.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)

    return causal_conv1d_update


def _scan_step(original: Callable) -> Callable:
    def selective_state_update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        if _keeps_original() or needs_gradients(state, hidden_states, dt, A, B, C, D, dt_bias, z):
            return original(
                state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **kwargs
            )
        # z comes before dt_bias here.
        return ops.selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)

    return selective_state_update


def _mamba_scan(original: Callable) -> Callable:
    def selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        arguments = (hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
        # The other arguments choose between the library's own implementations.
        return original(*arguments, **kwargs) if _keeps_original() else ops.selective_scan_fn(*arguments)

    return selective_scan


def _mamba2_scan(original: Callable) -> Callable:
    def chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        seq_idx: Tensor | None = None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        # By name: the two functions order them differently after `initial_states`.
        options = {"D": D, "z": z, "dt_bias": dt_bias, "initial_states": initial_states, "dt_softplus": dt_softplus}
        options |= {"dt_limit": dt_limit, "return_final_states": return_final_states, "seq_idx": seq_idx}
        refuse_cu_seqlens(kwargs)
        if _keeps_original():
            return original(hidden_states, dt, A, B, C, chunk_size, **options, **kwargs)
        # (B, L, H, P), and final states (B, H, P, N) where asked for
        out = ops.mamba_chunk_scan_combined(hidden_states, dt, A, B, C, chunk_size, **options)
        return pair(out) if return_final_states else single(out)

    return chunk_scan


def _no_fused_path(original: Callable) -> Callable:
    """Return None, so that a mixer calls its separate functions: the fused ones skip the padding mask."""

    def fused(*args, **kwargs) -> None:
        return None

    return fused


def _keeps_original(activation: str | None = None) -> bool:
    """Whether the library's own function runs."""
    # Here, since this module imports without transformers.
    from transformers.utils.import_utils import is_torchdynamo_exporting

    return activation not in (None, "silu", "swish") or is_torchdynamo_exporting()


_SHARED = {"causal_conv1d_update": _convolution_step}
_MAMBA = _SHARED | {
    "causal_conv1d_fn": functools.partial(_convolution, packs=False),
    "mamba_inner_fn": _no_fused_path,
    "mamba_selective_state_update": _scan_step,
    "mamba_selective_scan": _mamba_scan,
}
_MAMBA2 = _SHARED | {
    "causal_conv1d_fn": _convolution,
    "mamba2_split_conv1d_scan_combined": _no_fused_path,
    "mamba2_selective_state_update": _scan_step,
    "mamba2_chunk_scan": _mamba2_scan,
}
# Zamba's mixer has no fused function.
_ZAMBA = {name: replacement for name, replacement in _MAMBA.items() if name != "mamba_inner_fn"}
MODEL_TYPES: dict[str, dict[str, Callable[[Callable], Callable]]] = {
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "jamba": _MAMBA,
    "zamba": _ZAMBA,
    "mamba2": _MAMBA2,
    "bamba": _MAMBA2,
    "falcon_h1": _MAMBA2,
    "zamba2": _MAMBA2,
    "nemotron_h": _MAMBA2,
    "granitemoehybrid": _MAMBA2,
}
"""Replacements of the functions of each model type's module, by name."""

CONVOLUTION_ALONE: tuple[str, ...] = (
    "bailing_hybrid", "glm5_next", "inkling", "inkling2", "inkling2_loop", "kimi_linear", "lara_mini", "lfm2",
    "lfm2_moe", "lfm3", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen4_exp",
)  # fmt: skip
"""Model types that are not changed: they use the convolution, but no scan."""
