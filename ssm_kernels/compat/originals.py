"""Table of what is provided for the originals: their modules, the names in each, and the object here.

A value is `module:name`, where a module that starts with a dot is one of this package, or a `Refused`. Nothing is
imported before first access. The language model is in `vlmamba`, which `ssm_kernels` does not need.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refused:
    """A name of the originals that is not provided."""

    reason: str


@dataclass(frozen=True)
class Original:
    """A distribution: its import names are provided all together or not at all.

    Args:
        version: the release whose names and signatures are provided, in `__version__` and `importlib.metadata`.
        modules: names in each module. A package's submodules are not among its names.
        refused: modules that are not provided, each with the reason. Those inside them are refused with them.
    """

    version: str
    modules: dict[str, dict[str, str | Refused]]
    refused: dict[str, str]

    @property
    def import_names(self) -> tuple[str, ...]:
        """Top-level names, such as `mamba_ssm` and `selective_scan_cuda`."""
        return tuple(dict.fromkeys(name.split(".")[0] for name in self.modules))


def _here(module: str, *names: str, **renamed: str) -> dict[str, str | Refused]:
    """Return the table of one module's names, under their own name or renamed."""
    found: dict[str, str | Refused] = {name: f"{module}:{name}" for name in names}
    return found | {new: f"{module}:{old}" for new, old in renamed.items()}


_SCAN, _SSD, _CONV = ".mamba_ssm.selective_scan", ".mamba_ssm.ssd", ".mamba_ssm.causal_conv1d"
_NORM, _GATED, _STEP = ".mamba_ssm.layer_norm", ".mamba_ssm.layernorm_gated", ".mamba_ssm.state_update"
_MODULES, _EXTENSIONS, _MODEL = ".mamba_ssm.modules", ".extensions", "vlmamba.model.mamba_ssm"

_MAMBA_3 = "of Mamba-3 the module is provided: mamba_ssm.Mamba3"

MAMBA_SSM = Original(
    version="2.3.0",
    modules={
        "mamba_ssm": {
            **_here(_SCAN, "selective_scan_fn", "mamba_inner_fn"),
            **_here(_MODULES, "Mamba", "Mamba2", "Mamba3"),
            **_here(_MODEL, "MambaLMHeadModel"),
        },
        "mamba_ssm.ops.selective_scan_interface": {
            **_here(_SCAN, "selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref"),
            **_here(_SCAN, "SelectiveScanFn", "MambaInnerFn"),
            # Vim's fork
            **_here(_SCAN, "mamba_inner_fn_no_out_proj", "bimamba_inner_fn", "bimamba_inner_ref"),
            **_here(_CONV, "causal_conv1d_fn"),
        },
        "mamba_ssm.ops.triton.selective_state_update": _here(
            _STEP, "selective_state_update", "selective_state_update_ref"
        ),
        "mamba_ssm.ops.triton.ssd_combined": _here(
            _SSD,
            "mamba_chunk_scan_combined",
            "mamba_chunk_scan",
            "mamba_split_conv1d_scan_combined",
            "ssd_chunk_scan_combined_ref",
            "ssd_selective_scan",
            "mamba_conv1d_scan_ref",
            "mamba_split_conv1d_scan_ref",
        ),
        "mamba_ssm.ops.triton.layer_norm": _here(
            _NORM, "layer_norm_fn", "rms_norm_fn", "layer_norm_linear_fn", "RMSNorm", "layer_norm_ref", "rms_norm_ref"
        ),
        # The module up to release 1.2, with fewer arguments.
        "mamba_ssm.ops.triton.layernorm": _here(
            _NORM, "layer_norm_linear_fn", "RMSNorm", layer_norm_fn="layer_norm_fn_v1", rms_norm_fn="rms_norm_fn_v1"
        ),
        "mamba_ssm.ops.triton.layernorm_gated": _here(
            _GATED, "layernorm_fn", "rmsnorm_fn", "LayerNorm", "RMSNorm", "rms_norm_ref"
        ),
        "mamba_ssm.ops.triton.k_activations": _here(".mamba_ssm.activations", "swiglu"),
        "mamba_ssm.modules.mamba_simple": {
            **_here(_MODULES, "Mamba", "Block"),  # the block up to release 1.2
            **_here(_SCAN, "selective_scan_fn", "mamba_inner_fn"),
            **_here(_CONV, "causal_conv1d_fn", "causal_conv1d_update"),
            **_here(_STEP, "selective_state_update"),
            **_here(_NORM, "RMSNorm", "layer_norm_fn", "rms_norm_fn"),
        },
        "mamba_ssm.modules.mamba2": _here(_MODULES, "Mamba2"),
        "mamba_ssm.modules.mamba2_simple": _here(_MODULES, "Mamba2Simple"),
        "mamba_ssm.modules.mamba3": _here(_MODULES, "Mamba3"),
        "mamba_ssm.modules.mha": _here(_MODULES, "MHA"),
        "mamba_ssm.modules.mlp": _here(_MODULES, "GatedMLP"),
        "mamba_ssm.modules.block": _here(_MODULES, "Block"),
        "mamba_ssm.modules.ssd_minimal": _here(_SSD, "segsum", "ssd_minimal_discrete"),
        "mamba_ssm.models.config_mamba": _here(_MODEL, "MambaConfig"),
        "mamba_ssm.models.mixer_seq_simple": {
            **_here(_MODEL, "MambaLMHeadModel", "MixerModel", "MambaConfig", "create_block", "_init_weights"),
            **_here(_MODEL, "GenerationMixin", "load_config_hf", "load_state_dict_hf"),
            **_here(_MODULES, "Mamba", "Mamba2", "Mamba3", "MHA", "GatedMLP", "Block"),
            **_here(_NORM, "RMSNorm", "layer_norm_fn", "rms_norm_fn"),
        },
        # Copies of Mamba-2 import these; to use one is refused.
        "mamba_ssm.distributed.tensor_parallel": _here(
            ".mamba_ssm.distributed", "ColumnParallelLinear", "RowParallelLinear"
        ),
        "mamba_ssm.distributed.distributed_utils": _here(".mamba_ssm.distributed", "all_reduce", "reduce_scatter"),
        "mamba_ssm.utils.torch": _here(".mamba_ssm.autocast", "custom_fwd", "custom_bwd"),
        "mamba_ssm.utils.generation": {
            **_here(_MODULES, "InferenceParams"),
            **_here(_MODEL, "GenerationMixin", "DecodingCGCache", "decode", "sample", "update_graph_cache"),
            **_here(_MODEL, "modify_logits_for_top_k_filtering", "modify_logits_for_top_p_filtering"),
            **_here(_MODEL, "modify_logits_for_min_p_filtering", "modify_logit_for_repetition_penalty"),
        },
        "mamba_ssm.utils.hf": _here(_MODEL, "load_config_hf", "load_state_dict_hf"),
        "selective_scan_cuda": _here(_EXTENSIONS, fwd="selective_scan_fwd", bwd="selective_scan_bwd"),
    },
    refused={
        "mamba_ssm.modules.mamba3_simple": _MAMBA_3,
        "mamba_ssm.ops.tilelang": _MAMBA_3,
        "mamba_ssm.ops.cute": _MAMBA_3,
        "mamba_ssm.ops.triton.mamba3": _MAMBA_3,
        "mamba_ssm.modules.moe": "mixtures of experts are not offered",
        **{
            f"mamba_ssm.ops.triton.ssd_{part}": "the kernels here are not split in these parts; use ssd_combined"
            for part in ("bmm", "chunk_scan", "chunk_state", "state_passing")
        },
    },
)

CAUSAL_CONV1D = Original(
    version="1.6.1",
    modules={
        "causal_conv1d": _here(_CONV, "causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"),
        "causal_conv1d.causal_conv1d_interface": {
            **_here(_CONV, "causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"),
            **_here(_EXTENSIONS, "causal_conv1d_fwd_function", "causal_conv1d_bwd_function"),
            **_here(_EXTENSIONS, "causal_conv1d_update_function"),
        },
        "causal_conv1d.causal_conv1d_varlen": _here(
            _CONV, "causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"
        ),
        "causal_conv1d.cpp_functions": _here(
            _EXTENSIONS, "causal_conv1d_fwd_function", "causal_conv1d_bwd_function", "causal_conv1d_update_function"
        ),
        "causal_conv1d_cuda": _here(
            _EXTENSIONS, "causal_conv1d_fwd", "causal_conv1d_bwd", causal_conv1d_update="causal_conv1d_step"
        ),
    },
    refused={},
)

VMAMBA = Original(
    version="0.0.2",
    modules={
        "selective_scan_cuda_core": _here(_EXTENSIONS, fwd="selective_scan_core_fwd", bwd="selective_scan_core_bwd"),
        "selective_scan_cuda_oflex": _here(_EXTENSIONS, fwd="selective_scan_oflex_fwd", bwd="selective_scan_core_bwd"),
    },
    refused={},
)

ORIGINALS = {"mamba_ssm": MAMBA_SSM, "causal_conv1d": CAUSAL_CONV1D, "selective_scan": VMAMBA}
"""The originals by the name of their distribution."""
