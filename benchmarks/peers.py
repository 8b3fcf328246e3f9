"""The same calls by other libraries, where they are installed.

On a GPU `mamba_ssm`, `causal_conv1d` and `fla`; on a CPU `mambapy` and the formulations of `mamba_minimal` and
`mamba2_minimal`; on both `transformers`, with what it runs where no kernels are installed.

Each function binds a case's inputs, in this project's dimensions, to a call that returns y in those. The call contains
the views that a peer needs and the preparation that its own callers do. What a peer would copy because its memory
layout is another is laid out before, by `own_layout`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case

PACKAGES = {
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "fla": "flash-linear-attention",
    "transformers": "transformers",
    "mambapy": "mambapy",
    "mamba_minimal": "mamba-minimal",
    "mamba2_minimal": "mamba2-minimal",
}
"""Names of the peers' distributions or repositories, by import name."""
ON_CPU = ("transformers", "mambapy", "mamba_minimal", "mamba2_minimal")
"""Peers that run on a CPU."""
ON_GPU = ("mamba_ssm", "causal_conv1d", "fla", "transformers")
"""Peers that are compared on a GPU."""
_CLONE = "git clone https://github.com/{0} {1} && pip install einops, with the folder above {1} on PYTHONPATH"
INSTALL = {name: f"pip install {package}" for name, package in PACKAGES.items()} | {
    # Since July 2026 (f577286) mamba-ssm is installed without its CUDA scan unless that is asked for.
    "mamba_ssm": "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm",
    "mamba_minimal": _CLONE.format("johnma2006/mamba-minimal", "mamba_minimal"),
    "mamba2_minimal": _CLONE.format("tommyip/mamba2-minimal", "mamba2_minimal"),
}
"""The command that gets each peer. Two are no packages, but a file to clone."""

Call = Callable[[], Tensor]
"""A bound call, which returns y."""
Peer = Callable[..., Any]
"""A function or module class of a peer."""


def bind_peer(name: str, case: Case, t: Mapping[str, Tensor]) -> Call:
    """Bind a case's inputs to a peer's function.

    Raises:
        ModuleNotFoundError: the peer is not installed.
        ValueError: the peer does not have the op, or not with these options.
    """
    check_installed(name, case.op)
    lacks = case.initial_states or case.sequences or case.seq_idx or case.constant or not case.D
    lacks |= case.op == "selective_scan" and case.shape.groups > 1 and name in ("mambapy", "mamba_minimal")
    if case.op not in CALLS[name] or lacks or (name == "transformers" and case.norm_before_gate):
        raise ValueError(f"{name} is not compared on {case}")
    bind, path = CALLS[name][case.op]
    module, function = path.split(":")
    return bind(getattr(importlib.import_module(f"{name}{module}"), function), case, t)


def peers_of(op: str, device: str) -> tuple[str, ...]:
    """Peers that have an op on a device."""
    return tuple(name for name in (ON_CPU if device == "cpu" else ON_GPU) if op in CALLS[name])


def own_layout(name: str, case: Case, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lay a case's inputs out in memory as the peers take them, so that a timed call copies none of them.

    The selective scans of `mamba_ssm` and `transformers` read (B, D, L) and (B, N, L) with contiguous steps, which
    their own callers make, and copy what is not. The others take this project's layout.

    Returns:
        The inputs by name, with the same shapes and values; those that are laid out anew are leaves of their own.
    """
    if case.op != "selective_scan" or name not in ("mamba_ssm", "transformers"):
        return dict(t)
    return {name: _with_contiguous_steps(m) if name in ("u", "dt", "z", "B", "C") else m for name, m in t.items()}


def _with_contiguous_steps(m: Tensor) -> Tensor:
    """(B, L, ...) with steps next to each other in memory."""
    return m.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_(m.requires_grad)


def check_installed(name: str, op: str | None = None) -> None:
    """Check that a peer can be imported and, if an op is given, that it was built with what that op runs.

    Raises:
        ModuleNotFoundError: it cannot, or was not; the message has the command that installs it.
    """
    command = INSTALL[name]
    if importlib.util.find_spec(name) is None or (name in NEED_EINOPS and importlib.util.find_spec("einops") is None):
        raise ModuleNotFoundError(f"{name} is not installed: {command}")
    if (name, op) == ("mamba_ssm", "selective_scan") and importlib.util.find_spec("selective_scan_cuda") is None:
        raise ModuleNotFoundError(f"{name} is installed without its CUDA scan: {command} --force-reinstall")


def _scan(selective_scan: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    def run() -> Tensor:
        u, dt, z = (None if (m := t.get(k)) is None else m.transpose(1, 2) for k in ("u", "dt", "z"))  # (B, D, L)
        B, C = (t[k].movedim(1, -1) for k in ("B", "C"))  # (B, N, L) or (B, G, N, L)
        y = selective_scan(u, dt, t["A"], B, C, t["D"], z, t.get("dt_bias"), delta_softplus=case.dt_softplus)
        return y.transpose(1, 2)  # (B, L, D)

    return run


def _scan_of_block(block: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    """The scan of a block whose method has no dt bias, softplus or gate: its forward does these around it."""
    scan = block.selective_scan

    def run() -> Tensor:
        dt = t["dt"] + t["dt_bias"] if case.dt_bias else t["dt"]
        dt = F.softplus(dt) if case.dt_softplus else dt
        # Neither scan reads the block that it is a method of.
        y = scan(None, t["u"], dt, t["A"], t["B"], t["C"], t["D"])  # (B, L, D)
        return y * F.silu(t["z"]) if case.z else y

    return run


def _minimal_ssd(ssd: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    """An SSD that takes complete chunks, and B and C of each head."""
    repeats, length = case.shape.heads // case.shape.groups, case.shape.length
    padding = -length % CHUNK_OF_MINIMAL

    def run() -> Tensor:
        dt = t["dt"] + t["dt_bias"] if case.dt_bias else t["dt"]
        dt = F.softplus(dt) if case.dt_softplus else dt
        B, C = (t[k].repeat_interleave(repeats, dim=2) for k in ("B", "C"))  # (B, L, H, N)
        x, B, C = (F.pad(m, (0, 0, 0, 0, 0, padding)) for m in (t["x"], B, C))
        dt = F.pad(dt, (0, 0, 0, padding))  # steps of no length
        y = ssd(x, dt, t["A"], B, C, t["D"], CHUNK_OF_MINIMAL)[0][:, :length]  # (B, L, H, P)
        return y * F.silu(t["z"]) if case.z else y

    return run


def _ssd(chunk_scan: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    arguments = [t[k] for k in ("x", "dt", "A", "B", "C")]
    options = {"D": t["D"], "dt_bias": t.get("dt_bias"), "dt_softplus": case.dt_softplus}
    options |= {"z": t["z"]} if case.z else {}

    def run() -> Tensor:
        out = chunk_scan(*arguments, chunk_size=256, **options)  # chunk_size of the peers' own modules
        return out[0] if isinstance(out, tuple) else out

    return run


def _scan_step(state_update: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    state = t["state"].clone()
    B, C = (t[k].squeeze(1) for k in ("B", "C"))  # (B, 1, N) -> (B, N)
    options = {"z": t.get("z"), "dt_bias": t.get("dt_bias"), "dt_softplus": case.dt_softplus}
    return lambda: state_update(state, t["u"], t["dt"], t["A"], B, C, t["D"], **options)


def _ssd_step(state_update: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    """A step of Mamba-2 by one of Mamba-1, whose parameters are per channel."""
    state, p = t["state"].clone(), case.shape.headdim
    A = t["A"][:, None, None].expand(state.shape[1:])  # (H, P, N)
    dt, D = (t[k].unsqueeze(-1).expand(*t[k].shape, p) for k in ("dt", "D"))  # (B, H, P), (H, P)
    bias = None if (m := t.get("dt_bias")) is None else m.unsqueeze(-1).expand(-1, p)  # (H, P)
    options = {"D": D, "z": t.get("z"), "dt_bias": bias, "dt_softplus": case.dt_softplus}
    return lambda: state_update(state, t["x"], dt, A, t["B"], t["C"], **options)


def _conv(causal_conv1d_fn: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    activation = case.options["activation"]
    return lambda: causal_conv1d_fn(t["x"].transpose(1, 2), t["weight"], t["bias"], activation=activation).mT


def _causal_conv1d_step(causal_conv1d_update: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    window = F.pad(t["state"], (0, 0, 1, 0)).transpose(1, 2).contiguous()  # (B, D, K)
    return lambda: causal_conv1d_update(t["x"], window, t["weight"], t["bias"], case.options["activation"])


def _transformers_conv_step(causal_conv1d_update: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    window, activation = t["state"].transpose(1, 2).contiguous(), case.options["activation"]  # (B, D, K - 1)
    return lambda: causal_conv1d_update(t["x"].unsqueeze(-1), window, t["weight"], t["bias"], activation).squeeze(-1)


def _mamba_ssm_norm(rmsnorm_fn: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    return lambda: rmsnorm_fn(t["x"], t["weight"], None, z=t.get("z"), eps=1e-5, **case.options)


def _mamba_ssm_add_norm(rms_norm_fn: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    options = {"residual": t["residual"], "eps": 1e-5, "prenorm": True, "residual_in_fp32": True}
    return lambda: rms_norm_fn(t["x"], t["weight"], None, **options)[0]


def _transformers_norm(norm_class: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    norm = norm_class(case.shape.channels, case.options["group_size"], eps=1e-5)
    return lambda: torch.func.functional_call(norm, {"weight": t["weight"]}, (t["x"], t.get("z")))


def _transformers_add_norm(norm_class: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    norm = norm_class(case.shape.channels, eps=1e-5)

    def run() -> Tensor:
        residual = t["x"] + t["residual"]
        return torch.func.functional_call(norm, {"weight": t["weight"]}, (residual.to(t["weight"].dtype),))

    return run


def _fla_ssd(chunk_simple_gla: Peer, case: Case, t: Mapping[str, Tensor]) -> Call:
    """SSD as gated linear attention with one decay per head: queries C, keys B, values dt x."""
    repeats = case.shape.heads // case.shape.groups

    def run() -> Tensor:
        dt = t["dt"].float() + t.get("dt_bias", 0)
        dt = F.softplus(dt) if case.dt_softplus else dt
        keys, queries = (t[k].repeat_interleave(repeats, dim=2) for k in ("B", "C"))  # (B, L, H, N)
        values = (t["x"] * dt.unsqueeze(-1)).to(t["x"].dtype)  # (B, L, H, P)
        y, _ = chunk_simple_gla(queries, keys, values, dt * t["A"], scale=1.0)
        return y + (t["D"][:, None] * t["x"]).to(y.dtype)

    return run


CHUNK_OF_MINIMAL = 64
"""The chunk size that mamba2-minimal's own configuration has."""
NEED_EINOPS = ("mamba_minimal", "mamba2_minimal")
MAMBA, MAMBA2 = ".models.mamba.modeling_mamba", ".models.mamba2.modeling_mamba2"
"""Modules of `transformers` with the functions that it runs where no kernels are installed."""
CALLS: dict[str, dict[str, tuple[Callable[[Peer, Case, Mapping[str, Tensor]], Call], str]]] = {
    "mamba_ssm": {
        "selective_scan": (_scan, ".ops.selective_scan_interface:selective_scan_fn"),
        "selective_scan_step": (_scan_step, ".ops.triton.selective_state_update:selective_state_update"),
        "ssd": (_ssd, ".ops.triton.ssd_combined:mamba_chunk_scan_combined"),
        "ssd_step": (_ssd_step, ".ops.triton.selective_state_update:selective_state_update"),
        "rms_norm": (_mamba_ssm_norm, ".ops.triton.layernorm_gated:rmsnorm_fn"),
        "add_rms_norm": (_mamba_ssm_add_norm, ".ops.triton.layer_norm:rms_norm_fn"),
    },
    "causal_conv1d": {
        "causal_conv1d": (_conv, ":causal_conv1d_fn"),
        "causal_conv1d_step": (_causal_conv1d_step, ":causal_conv1d_update"),
    },
    "fla": {"ssd": (_fla_ssd, ".ops.simple_gla:chunk_simple_gla")},
    "transformers": {
        "selective_scan": (_scan, f"{MAMBA}:mamba_selective_scan"),
        "selective_scan_step": (_scan_step, f"{MAMBA}:mamba_selective_state_update"),
        "ssd": (_ssd, f"{MAMBA2}:mamba2_chunk_scan"),
        "ssd_step": (_ssd_step, f"{MAMBA2}:mamba2_selective_state_update"),
        "causal_conv1d": (_conv, f"{MAMBA}:causal_conv1d_fn"),
        "causal_conv1d_step": (_transformers_conv_step, f"{MAMBA}:causal_conv1d_update"),
        "rms_norm": (_transformers_norm, f"{MAMBA2}:MambaRMSNormGated"),
        "add_rms_norm": (_transformers_add_norm, f"{MAMBA}:MambaRMSNorm"),
    },
    "mambapy": {"selective_scan": (_scan_of_block, ".mamba:MambaBlock")},
    "mamba_minimal": {"selective_scan": (_scan_of_block, ".model:MambaBlock")},
    "mamba2_minimal": {"ssd": (_minimal_ssd, ".mamba2:ssd")},
}
"""The ops of each peer: the function that binds a case's inputs, and the module and name of the peer's own."""
