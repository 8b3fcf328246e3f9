"""Language models as ONNX graphs, for onnxruntime and other runtimes."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ssm_kernels import states
from ssm_kernels.export import decompositions

from .extras import install_command
from .files import PARTIAL, remove_partials
from .lm import MambaLM

GRAPHS: tuple[Literal["prompt", "step"], ...] = ("prompt", "step")
"""Graphs of a model: for two or more tokens, and for one."""
MAX_BATCH, MAX_LENGTH = 1 << 16, 1 << 24


class _Graph(nn.Module):
    """One forward on flat tensors: tokens and states in, logits after the last token and states out."""

    def __init__(self, lm: MambaLM):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        # A graph has no tuples: the tensors of the state come one after the other.
        parts = iter(past)
        state = [type(layer)(*(next(parts) for _ in layer)) for layer in self.lm.new_state(1)]
        last = torch.arange(input_ids.shape[1], device=input_ids.device)[-1:]  # (1,)
        out = self.lm(input_ids, state=state, logits_at=last, return_state=True)
        # (B, V), then the state
        return out.logits[:, 0], *states.named(out.state or []).values()


def trace(lm: MambaLM, graph: Literal["prompt", "step"]) -> ExportedProgram:
    """Trace a forward with dynamic batch, and length in a prompt, to a graph of ATen ops.

    Args:
        lm: model on a CPU.
        graph: `"prompt"` for two or more tokens, `"step"` for one.

    Returns:
        a program that takes input_ids (B, L) and the tensors of a state, and returns logits (B, V) and the tensors of
        the state after the last token.
    """
    is_prompt = graph == "prompt"
    batch = Dim("batch", max=MAX_BATCH)
    ids = torch.zeros(2, 5 if is_prompt else 1, dtype=torch.int64)  # (B, L)
    past = tuple(states.named(lm.new_state(2)).values())
    # A graph of one token and one of several differ: decoding has ops of its own.
    sizes = {0: batch} | ({1: Dim("length", min=2, max=MAX_LENGTH)} if is_prompt else {})
    # Without gradients the mixers recompute nothing.
    with torch.no_grad():
        program = torch.export.export(
            _Graph(lm), (ids, *past), dynamic_shapes=(sizes, tuple({0: batch} for _ in past)), strict=False
        )
        return program.run_decompositions(decompositions())


def check_installed() -> None:
    """Check that the packages of the `onnx` extra are there.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed: {install_command('onnx')}")


def export_onnx(lm: MambaLM, folder: str | Path) -> list[Path]:
    """Write `prompt.onnx` and `step.onnx`, each with its weights beside it.

    Both have the inputs `input_ids` (batch, length) int64 and `past.0.conv`, `past.0.ssm`, ..., and the outputs
    `logits` (batch, V) after the last token and `present.0.conv`, ...: the state, zeros before the first token.

    Args:
        lm: model on a CPU.
        folder: where to write; made if it does not exist. Files have their names when all are complete.

    Returns:
        the two files.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        ValueError: the model is not on a CPU.
    """
    check_installed()
    if lm.device.type != "cpu":
        raise ValueError(f"lm must be on a CPU to be exported, got {lm.device}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(states.named(lm.new_state(1)))
    # An interrupted export may have left its files.
    remove_partials(folder)
    with tempfile.TemporaryDirectory(prefix=".", suffix=PARTIAL, dir=folder) as name:
        staged = Path(name)
        for graph in GRAPHS:
            torch.onnx.export(
                trace(lm, graph),
                (),
                staged / f"{graph}.onnx",
                # Names for the dynamic sizes, which the states share.
                dynamic_shapes=({0: "batch"} | ({1: "length"} if graph == "prompt" else {}), *({} for _ in names)),
                input_names=["input_ids", *(f"past.{name}" for name in names)],
                output_names=["logits", *(f"present.{name}" for name in names)],
                dynamo=True,
                external_data=True,
                verbose=False,
            )
        lm.save_extras(staged)
        # Weights, in `prompt.onnx.data`, come before the graphs that name them.
        for path in sorted(staged.iterdir(), reverse=True):
            os.replace(path, folder / path.name)
    return [folder / f"{graph}.onnx" for graph in GRAPHS]
