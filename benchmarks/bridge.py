"""`ssm-bench bridge`: `transformers`' own models with and without `ssm_kernels.integrations.transformers.enable()`.

A model is built by the library from one configuration, once: both sides are the same object with the same weights,
called in turn. All its layers are state-space ones, with what else that model type has in a layer, such as an MLP; its
vocabulary is small, so that head and embedding weigh little.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

from ssm_kernels.integrations import transformers as integration

from . import report
from .cases import DTYPES
from .errors import off
from .measure import Result, environment, first_call, on
from .options import Bridge
from .run import command_line, measured_times, what_auto_takes
from .workloads import Workload

VOCABULARY = 256
HEADDIM = 64
AGREEMENT = 1e-4
"""Of the largest value: by how much results may differ in float32, and 16 roundings of a coarser dtype."""


def run_bridge(command: Bridge) -> None:
    """`ssm-bench bridge`."""
    if command.width < HEADDIM or command.width % HEADDIM:
        raise ValueError(f"width must be a multiple of {HEADDIM}, the width of a head; got {command.width}")
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("transformers is not installed: pip install transformers")
    with on(command.device):
        cases = [_case(command, model_type) for model_type in dict.fromkeys(command.model_type)]
    result = {"command": command_line(command), "op": "bridge", "dtype": command.dtype, "over": None, "cases": cases}
    result |= {"ours": what_auto_takes(command.device), **environment(command.device)}
    if command.out is not None:
        report.write_all(result, command.out)
    rows = [(case["name"], row) for case in cases for row in case["rows"]]
    if wrong := list(dict.fromkeys(name for name, row in rows if not row.get("is_right", True))):
        sys.exit(f"ssm-bench: {', '.join(wrong)}: not what transformers gives")


def _case(command: Bridge, model_type: str) -> dict:
    """Rows of both sides, and by how much ours differs."""
    torch.manual_seed(0)
    dtype = DTYPES[command.dtype]
    model = build_model(model_type, command.width, command.layers).to(command.device, dtype).train()
    tokens = torch.randint(VOCABULARY, (command.batch, command.length)).to(command.device)
    parameters = list(model.parameters())

    def theirs() -> torch.Tensor:
        return model(tokens, use_cache=False).logits

    def ours() -> torch.Tensor:
        with integration.enabled():
            return theirs()

    sides = {"ours": Workload(ours, parameters), "transformers": Workload(theirs, parameters)}
    allowed = max(AGREEMENT, 16 * torch.finfo(dtype).eps)
    case: dict = {"name": model_type, "truth": "transformers"}
    case["shape"] = {name: getattr(command, name) for name in ("batch", "length", "width", "layers")}
    case |= {"allowed_error": allowed, "allowed_gradient_error": allowed, "rows": []}
    for mode in command.mode:
        results, seconds = {}, {}
        for name, side in sides.items():
            results[name], seconds[name] = first_call(side, mode)
        rows = {name: {"impl": name, "mode": mode} for name in sides}
        rows["ours"] |= differences(results["ours"], results["transformers"], allowed)
        del results
        for name, row in measured_times(sides, seconds, mode, command.device, command.calls).items():
            rows[name] |= {"time": row, "floor": None, "bound": None, "share": None}
        case["rows"] += rows.values()
    print(report.table({"op": "bridge", "dtype": command.dtype}, case), flush=True)
    return case


def differences(got: Result, want: Result, allowed: float) -> dict[str, float | bool]:
    """Largest differences of y and of the gradients, each of its largest value, and whether they are allowed.

    A gradient that is less than a thousandth of the largest one is held against that.
    """
    found: dict[str, float | bool] = {"error": off(got.y, want.y.double())}
    if want.gradients:
        largest = max(w.abs().max().item() for w in want.gradients if w is not None)
        pairs = zip(got.gradients, want.gradients, strict=True)
        found["gradient_error"] = max(off(g, w.double(), 1e-3 * largest) for g, w in pairs if w is not None)
    return found | {"is_right": max(found.values()) <= allowed}


def build_model(model_type: str, width: int, layers: int) -> torch.nn.Module:
    """A language model of that type, of state-space layers alone.

    Its weights are random and, so that what the layers give weighs in the logits, larger than those of a fresh model.
    """
    import transformers

    inner, heads = 2 * width // HEADDIM, width // HEADDIM
    attention = {"num_attention_heads": heads, "num_key_value_heads": heads, "intermediate_size": 2 * width}
    mamba2 = {"mamba_n_heads": inner, "mamba_d_head": HEADDIM, "mamba_d_state": 128, "mamba_n_groups": 1}
    only = ["mamba"] * layers
    names, settings = {
        "mamba": ("Mamba", {"state_size": 16}),
        "falcon_mamba": ("FalconMamba", {"state_size": 16}),
        "mamba2": ("Mamba2", {"num_heads": inner, "head_dim": HEADDIM, "state_size": 128, "n_groups": 1}),
        "jamba": (
            "Jamba",
            {
                **attention, "attn_layer_period": layers + 1, "attn_layer_offset": layers, "num_experts": 1,
                "num_experts_per_tok": 1, "mamba_d_state": 16,
            },
        ),
        "zamba": (
            "Zamba",
            {
                **attention, "layers_block_type": only, "n_mamba_heads": 2, "mamba_d_state": 16,
                "mamba_dt_rank": max(1, width // 16), "attention_head_dim": 2 * HEADDIM,
            },
        ),
        "falcon_h1": ("FalconH1", {**attention, **mamba2, "mamba_d_ssm": 2 * width}),
        "bamba": ("Bamba", {**attention, **mamba2, "attn_layer_indices": []}),
        "zamba2": (
            "Zamba2",
            {
                **attention, "layers_block_type": only, "hybrid_layer_ids": [], "n_mamba_heads": inner,
                "mamba_headdim": HEADDIM, "mamba_d_state": 128, "mamba_ngroups": 1,
            },
        ),
        "nemotron_h": (
            "NemotronH",
            {
                **attention, "head_dim": HEADDIM, "layers_block_type": only, "ssm_state_size": 128,
                "mamba_num_heads": inner, "mamba_head_dim": HEADDIM, "n_groups": 1,
            },
        ),
        "granitemoehybrid": (
            "GraniteMoeHybrid",
            {
                **attention, **mamba2, "layer_types": only, "num_local_experts": 0,
                "shared_intermediate_size": 2 * width,
            },
        ),
    }[model_type]  # fmt: skip
    common = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "pad_token_id": 0}
    config = getattr(transformers, f"{names}Config")(**common | {"bos_token_id": 1, "eos_token_id": 2} | settings)
    model = getattr(transformers, f"{names}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=width**-0.5)
    return model
