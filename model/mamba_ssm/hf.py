"""`mamba_ssm.utils.hf`: config and weights of a checkpoint, by folder or name on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats import read_json
from ..hub import CONFIG, fetch, fetch_model
from ..weights import open_weights


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """Read the `config.json` of a folder or repository.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `hub.fetch`.
        ValueError: the file is damaged.
    """
    return read_json(fetch(model_name, [CONFIG]) / CONFIG)


def load_state_dict_hf(
    model_name: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Read the weights of a folder or repository; None keeps their device (the CPU) and dtype.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `hub.fetch`.
        ValueError: a file is damaged, or holds code.
    """
    return {n: t.to(device=device, dtype=dtype) for n, t in open_weights(fetch_model(model_name)).items()}
