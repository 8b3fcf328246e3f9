"""`ssm-bench integration`: `transformers`' models with and without `ssm_kernels.integrations.transformers.enable()`.

A model is built by the library from one configuration, once: both sides are the same object with the same weights,
called in turn. All its layers are state-space ones, with what else that model type has in a layer, such as an MLP; its
vocabulary is small, so that head and embedding weigh little.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from ssm_kernels.integrations import transformers as integration

from . import op_report
from .accuracy import relative_error
from .cases import DTYPES
from .environment import current_device
from .options import Integration
from .peers import check_installed
from .roofline import UNKNOWN
from .run import finish
from .timing import Result, first_call, time_rows
from .workloads import Workload

VOCAB_SIZE = 256
HEADDIM = 64
TOLERANCE = 1e-4
"""Allowed difference in float32, relative to the largest value; in a coarser dtype 16 roundings."""


def run_integration(command: Integration) -> None:
    """`ssm-bench integration`."""
    if command.width < HEADDIM or command.width % HEADDIM:
        raise ValueError(f"width must be a multiple of {HEADDIM}, the width of a head; got {command.width}")
    check_installed("transformers")
    with current_device(command.device):
        cases = [_measure(command, model_type) for model_type in dict.fromkeys(command.model_type)]
    result = {"op": "integration", "dtype": command.dtype, "over": None, "cases": cases}
    if wrong := list(dict.fromkeys(name for name, _ in finish(command, result))):
        sys.exit(f"ssm-bench: {', '.join(wrong)}: not the results of transformers")


def _measure(command: Integration, model_type: str) -> dict[str, Any]:
    """Rows of both sides, with the differences of ours."""
    torch.manual_seed(0)
    dtype = DTYPES[command.dtype]
    model = build_model(model_type, command.width, command.layers).to(command.device, dtype).train()
    tokens = torch.randint(VOCAB_SIZE, (command.batch, command.length)).to(command.device)  # (B, L)
    parameters: list[torch.Tensor] = list(model.parameters())

    def theirs() -> torch.Tensor:
        return model(tokens, use_cache=False).logits

    def ours() -> torch.Tensor:
        with integration.enabled():
            return theirs()

    sides = {"ours": Workload(ours, parameters), "transformers": Workload(theirs, parameters)}
    allowed = max(TOLERANCE, 16 * torch.finfo(dtype).eps)
    shape = {name: getattr(command, name) for name in ("batch", "length", "width", "layers")}
    case: dict[str, Any] = {"op": "integration", "name": model_type, "truth": "transformers", "shape": shape}
    case |= {"threads": torch.get_num_threads()}
    case |= {"allowed_error": allowed, "allowed_gradient_error": allowed, "rows": []}
    for mode in command.mode:
        results, first = {}, {}
        for name, side in sides.items():
            results[name], first[name] = first_call(side, mode)
        rows: dict[str, dict[str, Any]] = {name: {"impl": name, "mode": mode} for name in sides}
        rows["ours"] |= differences(results["ours"], results["transformers"], allowed)
        del results
        for name, times in time_rows(sides, first, mode, command.device, command.calls, command.budget).items():
            rows[name] |= {"time": times, **UNKNOWN}
        case["rows"] += rows.values()
    print(op_report.text({"op": "integration", "dtype": command.dtype}, case), flush=True)
    return case


def differences(got: Result, want: Result, allowed: float) -> dict[str, float | bool]:
    """Largest differences of y and of the gradients, relative to the largest value of each, and whether they pass.

    A gradient smaller than a thousandth of the largest one is compared relative to that thousandth.
    """
    found: dict[str, float | bool] = {"error": relative_error(got.y, want.y.double())}
    if want.gradients:
        largest = max(w.abs().max().item() for w in want.gradients if w is not None)
        pairs = zip(got.gradients, want.gradients, strict=True)
        errors = (relative_error(g, w.double(), 1e-3 * largest) for g, w in pairs if w is not None)
        found["gradient_error"] = max(errors)
    return found | {"is_right": max(found.values()) <= allowed}


def build_model(model_type: str, width: int, layers: int) -> torch.nn.Module:
    """Build a language model of that type, of state-space layers alone.

    Its weights are random, and larger than those of a fresh model, so that the layers weigh in the logits.
    """
    import transformers

    # heads of the state-space layers' inner width, and of attention
    inner, heads = 2 * width // HEADDIM, width // HEADDIM
    attention = {"num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": 2 * width}
    mamba2 = {"mamba_n_heads": inner, "mamba_d_head": HEADDIM, "mamba_d_state": 128, "mamba_n_groups": 1}
    only = ["mamba"] * layers
    names, settings = {
        "mamba": ("Mamba", {"state_size": 16}),
        "falcon_mamba": ("FalconMamba", {"state_size": 16}),
        "mamba2": ("Mamba2", {"num_heads": inner, "head_dim": HEADDIM, "state_size": 128, "n_groups": 1}),
        "jamba": ("Jamba", attention | {
            "attn_layer_period": layers + 1, "attn_layer_offset": layers, "num_experts": 1, "num_experts_per_tok": 1,
            "mamba_d_state": 16}),
        "zamba": ("Zamba", attention | {
            "layers_block_type": only, "n_mamba_heads": 2, "mamba_d_state": 16, "mamba_dt_rank": max(1, width // 16),
            "attention_head_dim": 2 * HEADDIM}),
        "falcon_h1": ("FalconH1", attention | mamba2 | {"mamba_d_ssm": 2 * width}),
        "bamba": ("Bamba", attention | mamba2 | {"attn_layer_indices": []}),
        "zamba2": ("Zamba2", attention | {
            "layers_block_type": only, "hybrid_layer_ids": [], "n_mamba_heads": inner, "mamba_headdim": HEADDIM,
            "mamba_d_state": 128, "mamba_ngroups": 1}),
        "nemotron_h": ("NemotronH", attention | {
            "head_dim": HEADDIM, "layers_block_type": only, "ssm_state_size": 128, "mamba_num_heads": inner,
            "mamba_head_dim": HEADDIM, "n_groups": 1}),
        "granitemoehybrid": ("GraniteMoeHybrid", attention | mamba2 | {
            "layer_types": only, "num_local_experts": 0, "shared_intermediate_size": 2 * width}),
    }[model_type]  # fmt: skip
    common = {"vocab_size": VOCAB_SIZE, "hidden_size": width, "num_hidden_layers": layers, "pad_token_id": 0}
    config = getattr(transformers, f"{names}Config")(**common | {"bos_token_id": 1, "eos_token_id": 2} | settings)
    model = getattr(transformers, f"{names}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=width**-0.5)
    return model
