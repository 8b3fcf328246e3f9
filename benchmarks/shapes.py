"""Sizes of the ops' problems, and shapes of their inputs. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem; an op reads those of `SIZES`."""

    batch: int = 2
    length: int = 1024
    channels: int = 512
    """D of the selective scan, the convolution and the norms; inner width of a block."""
    d_state: int = 16
    heads: int = 8
    headdim: int = 64
    groups: int = 1
    """Groups of B and C, or of the channels that a norm normalizes together."""
    width: int = 4
    """Taps of the convolution."""
    height: int = 1
    """Rows of the grid, whose area is `length`."""
    rank: int = 1
    """Inputs and outputs a head of Mamba-3; more than one is MIMO."""


SCAN = {"u": "B L D", "dt": "B L D", "A": "D N", "B": "B L G N", "C": "B L G N", "D": "D", "z": "B L D", "dt_bias": "D",
        "initial_states": "R D N"}  # fmt: skip
SSD = {"x": "B L H P", "dt": "B L H", "A": "H", "B": "B L G N", "C": "B L G N", "D": "H", "z": "B L H P",
       "dt_bias": "H", "initial_states": "R H P N"}  # fmt: skip
MAMBA3 = {
    "x": "B L H P", "dt": "B L H", "A": "B L H", "B": "B L M G N", "C": "B L M G N", "trap": "B L H", "angles": "B L J",
    "B_bias": "H M N", "C_bias": "H M N", "D": "H", "z": "B L H P", "mimo_x": "H M P", "mimo_z": "H M P",
    "mimo_o": "H M P",
}  # fmt: skip
MAMBA3_STATES = {"angles": "H J", "ssm": "H P N", "B": "M H N", "x": "H P"}
"""Parts of the state of Mamba-3, a row of each."""
CONV = {"x": "B L D", "weight": "D W", "bias": "D", "initial_states": "R W-1 D"}


def _step(inputs: dict[str, str], state: str) -> dict[str, str]:
    """Inputs of a decoding step: its state, and those of the op without length and initial states."""
    return {"state": state} | _without_length(inputs)


def _without_length(inputs: dict[str, str]) -> dict[str, str]:
    return {name: dims.replace("B L", "B") for name, dims in inputs.items() if name != "initial_states"}


def _states(name: str, rows: str) -> dict[str, str]:
    """The parts of a state of Mamba-3, an input each, named as in the op's error messages: `initial_states.ssm`."""
    return {f"{name}.{part}": f"{rows} {dims}" for part, dims in MAMBA3_STATES.items()}


INPUTS = {
    "selective_scan": SCAN,
    "ssd": SSD,
    "mamba3": MAMBA3 | _states("initial_states", "R"),
    "causal_conv1d": CONV,
    "rms_norm": {"x": "B L D", "weight": "D", "z": "B L D"},
    "add_rms_norm": {"x": "B L D", "weight": "D", "residual": "B L D"},
    "cross_scan": {"x": "B h w D"},
    "cross_merge": {"y": "B K hw D"},
    "cross_causal_conv1d": {"x": "B h w D", "weight": "K D W", "bias": "K D"},
    "cross_selective_scan": {
        "u": "B h w D", "dt": "B h w K D", "A": "K D N", "B": "B h w K N", "C": "B h w K N", "D": "K D",
        "dt_bias": "K D",
    },
    "cross_ssd": {
        "x": "B h w K H P", "dt": "B h w K H", "A": "K H", "B": "B h w K G N", "C": "B h w K G N", "D": "K H",
        "dt_bias": "K H",
    },
    "selective_scan_step": _step(SCAN, "B D N"),
    "ssd_step": _step(SSD, "B H P N"),
    "mamba3_step": _states("states", "B") | _without_length(MAMBA3),
    "causal_conv1d_step": _step(CONV, "B W-1 D"),
}  # fmt: skip
"""The ops, with the shapes of their floating-point inputs.

R is the batch, or the number of packed sequences; h x w is a grid of L positions (hw as one axis), and K the number of
directions; M is the rank of Mamba-3 and J its angles, one for four states. An input with the name of an option of
`Case` is there if the option is on.
"""
OPS = tuple(INPUTS)
BLOCKS = {
    "mamba_block": ("batch", "length", "channels", "d_state", "width"),
    "mamba2_block": ("batch", "length", "channels", "d_state", "headdim", "groups", "width"),
}
"""Complete mixers, and the sizes that each reads."""
LETTERS = {
    "batch": "B R", "length": "L w hw", "height": "h hw", "channels": "D", "heads": "H", "headdim": "P", "d_state": "N",
    "groups": "G", "width": "W", "rank": "M",
}  # fmt: skip
"""Sizes in the order in which they are shown, with the letters that stand for them or depend on them."""


def _sizes(inputs: dict[str, str]) -> tuple[str, ...]:
    # "W-1" is beside "W" in every op that has it.
    letters = set(" ".join(inputs.values()).split())
    return tuple(size for size, of_size in LETTERS.items() if letters & set(of_size.split()))


SIZES = {op: _sizes(inputs) for op, inputs in INPUTS.items()} | BLOCKS
"""Sizes that each op or block reads."""
SIZES["rms_norm"] += ("groups",)  # of the channels; no input has the shape of it
WIDTHS = {"130m": 768, "370m": 1024, "790m": 1536, "1.3b": 2048, "2.7b": 2560}
"""d_model of the published Mamba and Mamba-2 models (2.8b and 1.4b in Mamba-1), whose inner width is twice that."""
