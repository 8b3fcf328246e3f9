"""`vlmamba inspect`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .options import DtypeName, Positional


@dataclass
class Inspect:
    """Describe a checkpoint: parameters, memory of weights and state, operations per token. Weights are not read.

    Examples:
    $ vlmamba inspect vl-mamba-2.8b --dtype bf16
    $ vlmamba inspect runs/mine/model --json
    """

    model: Positional[str]
    """Folder, preset such as vl-mamba-2.8b or recipe (nothing is downloaded), or name on the Hugging Face Hub."""
    dtype: DtypeName | None = None
    """Dtype to compute sizes for; the checkpoint's own by default."""
    json: bool = False
    """Print JSON; sizes are bytes, and operations are floating-point operations."""

    def run(self) -> None:
        from ..model.inspect import inspect
        from ..train.base_model import named_model
        from .loading import torch_dtype

        report = inspect(named_model(self.model), torch_dtype(self.dtype))
        print(json.dumps(report.to_json(), indent=2) if self.json else report)
