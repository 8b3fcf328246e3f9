"""`vlmamba export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .options import Positional


@dataclass
class Export:
    """Write a language model as ONNX graphs in float32: one for prompts, one for decoding steps, with states in and
    out.

    Examples:
    $ vlmamba export state-spaces/mamba-130m --onnx mamba-130m-onnx
    """

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub, in any known layout."""
    onnx: Path
    """Folder to write prompt.onnx and step.onnx to, with their weights and the tokenizer."""

    def run(self) -> None:
        import torch

        from ..model.lm import MambaLM
        from ..model.load import load_model
        from ..model.onnx_export import check_installed, export_onnx
        from ..train.base_model import saved_model

        check_installed()
        model = load_model(saved_model(self.model), dtype=torch.float32)
        if not isinstance(model, MambaLM):
            raise ValueError(f"{self.model} is a vision-language model; only language models are exported to ONNX")
        for file in export_onnx(model, self.onnx):
            print(f"wrote {file}")
