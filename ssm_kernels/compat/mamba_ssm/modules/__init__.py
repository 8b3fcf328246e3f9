"""The modules of `mamba_ssm`: constructor arguments, parameter names and shapes, caches for decoding.

`A_log` and `D` are float32 at least, whatever `dtype` is (the original's Mamba-2 casts `A_log`); `.to(dtype)` casts
them, as it does there. Differences from the originals are noted where they are; everything else is as there.

Letters: B batch, L length, D model width, E inner width, N state, H heads, P head dimension, G groups, K convolution
width, S sequences in a pack.
"""

from .block import Block, add_norm
from .inference import InferenceParams
from .mamba2 import Mamba2
from .mamba2_simple import Mamba2Simple
from .mamba3 import Mamba3
from .mamba_simple import Mamba
from .mha import MHA
from .mlp import GatedMLP

__all__ = ["MHA", "Block", "GatedMLP", "InferenceParams", "Mamba", "Mamba2", "Mamba2Simple", "Mamba3", "add_norm"]
