"""The Mamba, Mamba-2 and Mamba-3 mixers on these ops, with the parameter names of the published checkpoints.

Letters: B batch, L length, D model width, E = expand * D inner width, N state, R rank of dt, H heads, P head
dimension, G groups, K convolution width, S sequences in a pack.
"""

from .conv import conv_weight, depthwise_conv
from .fused_step import fuse_step, obstacle_to_fusing
from .mamba import Mamba
from .mamba2 import Mamba2
from .mamba3 import Mamba3, Mamba3MixerOutput
from .mixer import StatefulMixer
from .norm import RMSNorm
from .parameters import decay_rate, initial_dt_bias, is_plain, without_weight_decay
from .quantized import QuantizedEmbedding, QuantizedLinear, QuantizedMatrix
from .state import LayerState, MixerOutput, MixerState, NarrowMamba3States, NarrowMixerState

__all__ = [
    "LayerState",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "Mamba3MixerOutput",
    "MixerOutput",
    "MixerState",
    "NarrowMamba3States",
    "NarrowMixerState",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedMatrix",
    "RMSNorm",
    "StatefulMixer",
    "conv_weight",
    "decay_rate",
    "depthwise_conv",
    "fuse_step",
    "initial_dt_bias",
    "is_plain",
    "obstacle_to_fusing",
    "without_weight_decay",
]
