"""The same calls by other libraries, where they are installed: `mamba_ssm`, `causal_conv1d`, `fla`, `transformers`.

Each function binds a case's inputs, in this project's layout, to a call that returns y in that layout. The call
contains the views that a peer needs and the preparation that its own callers do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case

PACKAGES = {
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "fla": "flash-linear-attention",
    "transformers": "transformers",
}
"""Names of the peers' distributions, for pip, by import name."""

Call = Callable[[], Tensor]
"""A bound call, which returns y."""


def bind_peer(name: str, case: Case, t: Mapping[str, Tensor]) -> Call:
    """Bind a case's inputs to a peer's function.

    Raises:
        ModuleNotFoundError: the peer is not installed.
        ValueError: the peer does not have the op, or not with these options.
    """
    check_installed(name)
    bind = CALLS[name].get(case.op)
    lacks = case.initial_states or case.sequences or case.seq_idx or case.constant or not case.D
    if bind is None or lacks or (name == "transformers" and case.norm_before_gate):
        raise ValueError(f"{name} is not compared on {case}")
    return bind(case, t)


def check_installed(name: str) -> None:
    """Check that a peer can be imported.

    Raises:
        ModuleNotFoundError: it cannot; the message has the command that installs it.
    """
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"{name} is not installed: pip install {PACKAGES[name]}")


def _mamba_ssm_scan(case: Case, t: Mapping[str, Tensor]) -> Call:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]

    def run() -> Tensor:
        u, dt, z = (None if (m := t.get(k)) is None else m.transpose(1, 2) for k in ("u", "dt", "z"))
        B, C = (t[k].movedim(1, -1) for k in ("B", "C"))  # (B, N, L) or (B, G, N, L)
        y = selective_scan_fn(u, dt, t["A"], B, C, t["D"], z, t.get("dt_bias"), case.dt_softplus)
        return y.transpose(1, 2)  # (B, L, D)

    return run


def _mamba_ssm_ssd(case: Case, t: Mapping[str, Tensor]) -> Call:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]

    arguments = [t[k] for k in ("x", "dt", "A", "B", "C")]
    options = {"D": t["D"], "z": t.get("z"), "dt_bias": t.get("dt_bias"), "dt_softplus": case.dt_softplus}
    return lambda: mamba_chunk_scan_combined(*arguments, 256, **options)  # chunk_size of its own modules


def _mamba_ssm_scan_step(case: Case, t: Mapping[str, Tensor]) -> Call:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # pyright: ignore[reportMissingImports]

    state = t["state"].clone()
    arguments = [t[k] for k in ("u", "dt", "A", "B", "C", "D")] + [t.get("z"), t.get("dt_bias")]
    return lambda: selective_state_update(state, *arguments, dt_softplus=case.dt_softplus)


def _mamba_ssm_ssd_step(case: Case, t: Mapping[str, Tensor]) -> Call:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # pyright: ignore[reportMissingImports]

    return _ssd_step(selective_state_update, case, t)


def _ssd_step(selective_state_update: Callable[..., Tensor], case: Case, t: Mapping[str, Tensor]) -> Call:
    """A step of Mamba-2 by one of Mamba-1, whose parameters are per channel."""
    state, p = t["state"].clone(), case.shape.headdim
    A = t["A"][:, None, None].expand(state.shape[1:])  # (H, P, N)
    dt, D = (t[k].unsqueeze(-1).expand(*t[k].shape, p) for k in ("dt", "D"))  # (B, H, P), (H, P)
    bias = None if (m := t.get("dt_bias")) is None else m.unsqueeze(-1).expand(-1, p)
    options = {"D": D, "z": t.get("z"), "dt_bias": bias, "dt_softplus": case.dt_softplus}
    return lambda: selective_state_update(state, t["x"], dt, A, t["B"], t["C"], **options)


def _mamba_ssm_norm(case: Case, t: Mapping[str, Tensor]) -> Call:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn  # pyright: ignore[reportMissingImports]

    return lambda: rmsnorm_fn(t["x"], t["weight"], None, z=t.get("z"), eps=1e-5, **case.options)


def _mamba_ssm_add_norm(case: Case, t: Mapping[str, Tensor]) -> Call:
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn  # pyright: ignore[reportMissingImports]

    options = {"residual": t["residual"], "eps": 1e-5, "prenorm": True, "residual_in_fp32": True}
    return lambda: rms_norm_fn(t["x"], t["weight"], None, **options)[0]


def _causal_conv1d(case: Case, t: Mapping[str, Tensor]) -> Call:
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

    activation = case.options["activation"]
    return lambda: causal_conv1d_fn(t["x"].transpose(1, 2), t["weight"], t["bias"], activation=activation).mT


def _causal_conv1d_step(case: Case, t: Mapping[str, Tensor]) -> Call:
    from causal_conv1d import causal_conv1d_update  # pyright: ignore[reportMissingImports]

    window = F.pad(t["state"], (0, 0, 1, 0)).transpose(1, 2).contiguous()  # (B, D, K)
    return lambda: causal_conv1d_update(t["x"], window, t["weight"], t["bias"], case.options["activation"])


def _fla_ssd(case: Case, t: Mapping[str, Tensor]) -> Call:
    """SSD as gated linear attention with one decay per head: queries C, keys B, values dt x."""
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    repeats = case.shape.heads // case.shape.groups

    def run() -> Tensor:
        dt = t["dt"].float() + t.get("dt_bias", 0)
        dt = F.softplus(dt) if case.dt_softplus else dt
        keys, queries = (t[k].repeat_interleave(repeats, dim=2) for k in ("B", "C"))  # (B, L, H, N)
        values = (t["x"] * dt.unsqueeze(-1)).to(t["x"].dtype)  # (B, L, H, P)
        y, _ = chunk_simple_gla(queries, keys, values, dt * t["A"], scale=1.0)
        return y + (t["D"][:, None] * t["x"]).to(y.dtype)

    return run


def _transformers_scan(case: Case, t: Mapping[str, Tensor]) -> Call:
    """The code that `transformers` runs where no kernels are installed, like the other functions of it here."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def run() -> Tensor:
        u, dt, B, C, z = (None if (m := t.get(k)) is None else m.transpose(1, 2) for k in ("u", "dt", "B", "C", "z"))
        y = mamba_selective_scan(u, dt, t["A"], B, C, t["D"], z, t.get("dt_bias"), delta_softplus=case.dt_softplus)
        return y.transpose(1, 2)

    return run


def _transformers_ssd(case: Case, t: Mapping[str, Tensor]) -> Call:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    options = {"D": t["D"], "dt_bias": t.get("dt_bias"), "dt_softplus": case.dt_softplus}

    def run() -> Tensor:
        out = mamba2_chunk_scan(t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size=256, **options)
        return out[0] if isinstance(out, tuple) else out

    return run


def _transformers_conv(case: Case, t: Mapping[str, Tensor]) -> Call:
    from transformers.models.mamba.modeling_mamba import causal_conv1d_fn

    activation = case.options["activation"]
    return lambda: causal_conv1d_fn(t["x"].transpose(1, 2), t["weight"], t["bias"], activation=activation).mT


def _transformers_scan_step(case: Case, t: Mapping[str, Tensor]) -> Call:
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    state = t["state"].clone()
    B, C = (t[k].squeeze(1) for k in ("B", "C"))  # (B, 1, N) -> (B, N)
    arguments = [t["u"], t["dt"], t["A"], B, C, t["D"]]
    options = {"dt_bias": t.get("dt_bias"), "dt_softplus": case.dt_softplus, "z": t.get("z")}
    return lambda: mamba_selective_state_update(state, *arguments, **options)


def _transformers_ssd_step(case: Case, t: Mapping[str, Tensor]) -> Call:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    return _ssd_step(mamba2_selective_state_update, case, t)


def _transformers_conv_step(case: Case, t: Mapping[str, Tensor]) -> Call:
    from transformers.models.mamba.modeling_mamba import causal_conv1d_update

    window, activation = t["state"].transpose(1, 2).contiguous(), case.options["activation"]
    return lambda: causal_conv1d_update(t["x"].unsqueeze(-1), window, t["weight"], t["bias"], activation).squeeze(-1)


def _transformers_norm(case: Case, t: Mapping[str, Tensor]) -> Call:
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    norm = MambaRMSNormGated(case.shape.channels, case.options["group_size"], eps=1e-5)
    return lambda: torch.func.functional_call(norm, {"weight": t["weight"]}, (t["x"], t.get("z")))


def _transformers_add_norm(case: Case, t: Mapping[str, Tensor]) -> Call:
    from transformers.models.mamba.modeling_mamba import MambaRMSNorm

    norm = MambaRMSNorm(case.shape.channels, eps=1e-5)

    def run() -> Tensor:
        residual = t["x"] + t["residual"]
        return torch.func.functional_call(norm, {"weight": t["weight"]}, (residual.to(t["weight"].dtype),))

    return run


CALLS: dict[str, dict[str, Callable[[Case, Mapping[str, Tensor]], Call]]] = {
    "mamba_ssm": {
        "selective_scan": _mamba_ssm_scan, "ssd": _mamba_ssm_ssd, "rms_norm": _mamba_ssm_norm,
        "add_rms_norm": _mamba_ssm_add_norm, "selective_scan_step": _mamba_ssm_scan_step,
        "ssd_step": _mamba_ssm_ssd_step,
    },
    "causal_conv1d": {"causal_conv1d": _causal_conv1d, "causal_conv1d_step": _causal_conv1d_step},
    "fla": {"ssd": _fla_ssd},
    "transformers": {
        "selective_scan": _transformers_scan, "ssd": _transformers_ssd, "causal_conv1d": _transformers_conv,
        "selective_scan_step": _transformers_scan_step, "ssd_step": _transformers_ssd_step,
        "causal_conv1d_step": _transformers_conv_step, "rms_norm": _transformers_norm,
        "add_rms_norm": _transformers_add_norm,
    },
}  # fmt: skip
