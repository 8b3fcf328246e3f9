"""Decoding steps of all layers of a language model as one compiled kernel on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .._core.dispatch import HAS_NUMBA, NUMBA_MISSING
from .mamba import Mamba
from .mamba2 import Mamba2
from .norm import RMSNorm
from .numba.tensors import Layer
from .parameters import is_plain
from .quantized import QuantizedLinear
from .state import MixerState

KINDS = (Mamba, Mamba2, RMSNorm, nn.Linear, QuantizedLinear, nn.Conv1d)
PRECISE = ("A_log", "D", "dt_bias", "dt_proj.bias")
"""Parameters of a mixer that may have a dtype of their own, which they share."""


def fuse_step(
    layers: Sequence[Layer],
    norm: RMSNorm,
    head: nn.Linear | QuantizedLinear,
    states: Sequence[MixerState],
    tokens: int = 1,
) -> Callable[[Tensor], Tensor | None]:
    """Make the function that advances all layers by one token and predicts the next one.

    Activations are float32 throughout, also where weights are bfloat16 or quantized, which are read as they are.
    For a product with a quantized matrix a vector is rounded to integers of 16 bits, its largest element to 32,767.
    Weights and states are used where they are: changes in place count.

    Args:
        layers: the norm and the mixer of each layer, without an `obstacle_to_fusing`.
        norm: the norm after the last layer.
        head: the projection to logits.
        states: state of each layer; updated in place.
        tokens: number of successive rows of the batch that are tokens of one sequence. Its state before the step is
            that of the first of them; afterwards each has the state after its token.

    Returns:
        a function of the embeddings (B, D) that returns logits (B, V) in float32, which are valid until the next call;
        or None, without effect, after a weight or a state has moved to other memory.

    Raises:
        ValueError: there is an obstacle to fusing, or a state is not contiguous, not of `Mixer.new_state`'s dtypes, or
            has a number of rows that `tokens` does not divide.
    """
    if (obstacle := obstacle_to_fusing(layers, norm, head)) is not None:
        raise ValueError(f"layers must be ones that can be fused, but {obstacle}")
    dtype = norm.weight.dtype
    for state in states:
        got = [(t.dtype, t.is_contiguous()) for t in state]
        if got != [(dtype, True), (torch.float32, True)]:
            want = f"{dtype} and torch.float32"
            raise ValueError(f"states must be contiguous, in {want}; got (dtype, is contiguous) {got}")
        if tokens < 1 or len(state.conv) % tokens:
            raise ValueError(f"tokens must divide the {len(state.conv)} rows of the states, got {tokens}")
    from .numba.stack import FusedStep  # needs numba

    return FusedStep(layers, norm, head, states, tokens)


def obstacle_to_fusing(layers: Sequence[tuple[nn.Module, nn.Module]], norm: nn.Module, head: nn.Module) -> str | None:
    """Return the reason why `fuse_step` cannot take these modules, or None.

    Args:
        layers: the norm and the mixer of each layer.
        norm: the norm after the last layer.
        head: the projection to logits.

    Returns:
        the reason, as half a sentence.
    """
    if not HAS_NUMBA:
        return NUMBA_MISSING
    modules = [head, norm, *(module for layer in layers for module in layer)]
    for module in (part for m in modules for part in m.modules()):
        kind = next((k for k in KINDS if isinstance(module, k)), None)
        if kind is None or not is_plain(module, kind):
            return f"{type(module).__name__} is adapted, quantized, hooked, or of an unknown kind"
    mixers = [mixer for _, mixer in layers if type(mixer) in (Mamba, Mamba2) and isinstance(mixer, (Mamba, Mamba2))]
    if len(mixers) < len(layers) or len({(type(m), sizes(m)) for m in mixers}) != 1:
        return "its mixers are not all Mamba or all Mamba2, of the same sizes, options and bits of quantized weights"
    norms = [n for n in (norm, *(n for n, _ in layers)) if isinstance(n, RMSNorm)]
    if len(norms) <= len(layers) or len({n.eps for n in norms}) > 1 or any(n.group_size is not None for n in norms):
        return "its norms are not all RMSNorm of all channels, with one epsilon"
    if any(isinstance(m, Mamba2) and m.d_mlp for m in mixers):
        return "its mixers have an MLP"
    # Of each group of weights the kernel takes one dtype.
    quantized = [p for m in modules for q in m.modules() if isinstance(q, QuantizedLinear) for p in (q.qdata, q.scale)]
    named = [(n, p) for m in modules for n, p in m.named_parameters() if all(p is not q for q in quantized)]
    for precise in (False, True):
        dtypes = sorted({str(p.dtype) for n, p in named if (n in PRECISE) == precise})
        if dtypes not in (["torch.float32"], ["torch.bfloat16"]):
            which = f"its {', '.join(PRECISE)} are" if precise else "its weights are"
            return f"{which} {', '.join(dtypes)}, not all float32 or all bfloat16"
    if any(p.is_floating_point() and p.dtype != torch.bfloat16 for p in quantized):
        return "the scales of its quantized weights are not bfloat16"
    weights = [*(p for _, p in named), *quantized]
    if any(type(p) is not nn.Parameter or p.device.type != "cpu" or not p.is_contiguous() for p in weights):
        return "its weights are not all plain contiguous parameters on the CPU"
    return None


def sizes(mixer: Mamba | Mamba2) -> tuple:
    """Return everything that the step of a mixer depends on besides its tensors."""
    bits = tuple(getattr(layer, "bits", None) for layer in mixer.children())
    common = (mixer.d_model, mixer.d_inner, mixer.d_state, mixer.d_conv, bits)
    if isinstance(mixer, Mamba):
        return *common, mixer.dt_rank, mixer.dt_bc_norm_eps
    has_norm = (mixer.norm.eps, mixer.norm.group_size, mixer.norm.norm_before_gate) if mixer.rmsnorm else None
    options = (mixer.D_has_hdim, mixer.norm_before_gate, tuple(mixer.dt_limit), has_norm)
    return *common, mixer.headdim, mixer.ngroups, mixer.d_ssm, *options
