"""The convolution step of a mixer: a layer that holds the weights, and the op that runs in its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from .._core.dispatch import bind_backend
from .._core.sharding import local
from ..causal_conv1d import causal_conv1d
from ..context_parallel import conv_halo, current_sharding
from .parameters import call_extras


def depthwise_conv(channels: int, width: int, bias: bool) -> nn.Conv1d:
    """Make the layer that holds the weights of a causal convolution under the checkpoints' names; see `conv_weight`.

    Called with (B, channels, L), its first L results are those of the causal convolution.

    Args:
        channels: channels of the input and of the output.
        width: K, taps of each channel.
        bias: whether the layer has a bias (channels,).

    Returns:
        a layer with weight (channels, 1, K).
    """
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias)


def conv_weight(name: str, conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Read the weight and bias of a `depthwise_conv`, for the op that convolves in its place.

    Hooks that are registered for all modules at once (flop counters, profilers) see the mixer, and not this layer.

    Args:
        name: attribute that holds the layer, for the message of an error.
        conv: the layer.

    Returns:
        weight (channels, K), and bias (channels,) or None.

    Raises:
        TypeError: the layer has been replaced, or has hooks of its own, which the op would bypass.
    """
    kind, extras = type(conv), call_extras(conv)
    if not isinstance(conv, nn.Conv1d) or kind.forward is not nn.Conv1d.forward or extras:
        is_subclass = kind.forward is nn.Conv1d.forward
        got = f"one with {extras}" if is_subclass else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(
            f"{name} must be a plain torch.nn.Conv1d, since a fused op reads its weight and never calls it; got {got}. "
            "Leave it out of what is adapted, quantized or hooked, or merge it back"
        )
    return conv.weight.squeeze(1), conv.bias


class Convolved(NamedTuple):
    """Output of a mixer's convolution."""

    y: Tensor
    """(B, L, channels), after silu."""
    final_states: Tensor
    """(B or S, K - 1, channels) last inputs of this rank's steps."""
    recompute: Callable[[], Tensor]
    """Computes `y` again, on the same backend and without communication."""


def convolve(conv: nn.Module, x: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> Convolved:
    """Convolve x (B, L, channels) over time with the weights of `conv`, followed by silu.

    Args:
        conv: a `depthwise_conv`.
        x: (B, L, channels) input; within `context_parallel`, this rank's steps.
        initial_states: (B or S, K - 1, channels) inputs before the first step, or None.
        cu_seqlens: (S + 1,) bounds of packed sequences, or None.

    Returns:
        the output, the final states, and a function that computes the output again.
    """
    weight, bias = conv_weight("conv1d", conv)
    # The op would exchange its halo again when it recomputes: exchange it here, and call the local op twice.
    x, initial_states, cu_seqlens = conv_halo(current_sharding(), x, weight.shape[1], initial_states, cu_seqlens)
    run = partial(local(causal_conv1d), x, weight, bias, "silu", initial_states, cu_seqlens=cu_seqlens)
    y, final_states = run()
    return Convolved(y, final_states, bind_backend(lambda: run().y))
