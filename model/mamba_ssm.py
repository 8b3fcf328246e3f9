"""`mamba_ssm`'s language model by its names: constructor arguments, and a state dict that moves over unchanged.

from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

become `from vlmamba.model.mamba_ssm import MambaConfig, MambaLMHeadModel`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .config import LMConfig
from .formats.language import from_state_spaces
from .lm import MambaLM

# What settings of a layer that only initialise are by default; a model with others would begin elsewhere.
_INITIAL = {"dt_min": 0.001, "dt_max": 0.1, "dt_init_floor": 1e-4, "dt_init": "random", "dt_scale": 1.0}
_INITIAL |= {"conv_init": None, "A_init_range": (1, 16), "process_group": None}


@dataclass
class MambaConfig:
    """The settings of `mamba_ssm`'s class of this name."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class MambaLMHeadModel(MambaLM):
    """A `MambaLM` from the arguments of `mamba_ssm`'s class of this name.

    Args:
        config: of the original; or an `LMConfig`, as `from_pretrained` gives.
        initializer_cfg: None, or empty: the original's default.
        device, dtype: of the parameters.

    Raises:
        ValueError: a setting that is not supported, by name.
    """

    def __init__(
        self,
        config: MambaConfig | LMConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if initializer_cfg:
            raise ValueError(f"initializer_cfg must be None or empty, got {initializer_cfg!r}")
        if isinstance(config, MambaConfig):
            for name, default in _INITIAL.items():
                value = config.ssm_cfg.get(name, default)
                if (tuple(value) if isinstance(value, list) else value) != default:
                    raise ValueError(f"ssm_cfg: {name} is {value!r}, but only {default!r} is supported")
            config = from_state_spaces(asdict(config))
        super().__init__(config)
        self.to(device=device, dtype=dtype)
