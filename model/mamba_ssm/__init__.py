"""Drop-in replacement of the `mamba_ssm` language model: constructor, checkpoints, `generate` and caches.

Change what is imported from `mamba_ssm.models.mixer_seq_simple`, `mamba_ssm.models.config_mamba`,
`mamba_ssm.utils.generation` and `mamba_ssm.utils.hf`, or leave it and call `ssm_kernels.compat.install()` first::

    from vlmamba.model.mamba_ssm import MambaConfig, MambaLMHeadModel, InferenceParams

The model is a separate `nn.Module`: tokens in and out, as in the original, with attention layers and MLPs.
`vlmamba.model.MambaLM` is this library's language model, with text in and out.
"""

from .generation import (
    DecoderOnlyOutput,
    DecodingCGCache,
    GenerationMixin,
    InferenceParams,
    decode,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
    update_graph_cache,
)
from .hf import load_config_hf, load_state_dict_hf
from .mixer_seq_simple import (
    CausalLMOutput,
    MambaConfig,
    MambaLMHeadModel,
    MixerModel,
    _init_weights,
    create_block,
)

__all__ = [
    "CausalLMOutput",
    "DecoderOnlyOutput",
    "DecodingCGCache",
    "GenerationMixin",
    "InferenceParams",
    "MambaConfig",
    "MambaLMHeadModel",
    "MixerModel",
    "_init_weights",
    "create_block",
    "decode",
    "load_config_hf",
    "load_state_dict_hf",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "update_graph_cache",
]
