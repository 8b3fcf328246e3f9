"""`vlmamba convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .options import DtypeName, Positional, Quantization


@dataclass
class Convert:
    """Write a model in another layout: this library's; for language models, that of state-spaces (mamba_ssm) or
    transformers; for vision-language models, that of Cobra's and ML-Mamba's releases.

    Examples:
    $ vlmamba convert state-spaces/mamba-130m mamba-130m --to transformers
    $ vlmamba convert runs/mine/model runs/mine/int8 --to own --quantize int8
    """

    src: Positional[str]
    """Folder, or name on the Hugging Face Hub, in any known layout."""
    dst: Positional[Path]
    """Folder to write, new or empty."""
    to: Literal["own", "state-spaces", "transformers", "released"]
    """Layout to write."""
    dtype: DtypeName | None = None
    """Dtype of the weights; the checkpoint's own by default."""
    quantize: Quantization | None = None
    """Hold the matrices of language model and encoders in 8 or 4 bits, with scales (--to own)."""

    def run(self) -> None:
        from ..model.convert import convert
        from ..train.base_model import saved_model
        from .loading import torch_dtype

        convert(saved_model(self.src), self.dst, to=self.to, dtype=torch_dtype(self.dtype), quantize=self.quantize)
        print(f"wrote {self.dst}")
