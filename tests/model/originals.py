"""Small models of `transformers` with random weights, and ours with the same weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from vlmamba.model import LMConfig, MambaLM


def config_pair(layer: str, n_layer: int, ngroups: int = 1) -> tuple[LMConfig, Any]:
    """Return our configuration of a small model with 101 tokens, padded to 104, and that of `transformers`."""
    if layer == "mamba":
        return LMConfig(32, n_layer, 101, "mamba", d_state=8), transformers.MambaConfig(
            vocab_size=104, hidden_size=32, state_size=8, num_hidden_layers=n_layer, use_mambapy=False, pad_token_id=0
        )
    ours = LMConfig(32, n_layer, 101, "mamba2", d_state=16, headdim=16, ngroups=ngroups, chunk_size=8)
    return ours, transformers.Mamba2Config(
        vocab_size=104, hidden_size=32, state_size=16, head_dim=16, num_heads=4, n_groups=ngroups,
        num_hidden_layers=n_layer, chunk_size=8, tie_word_embeddings=True, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip


def random_original(config: Any, embedding_scale: float = 3) -> Any:
    """Build a model of `transformers` from seed 0, with no parameter at its initial value."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.05))
            if "embeddings" in name:
                p.mul_(embedding_scale)
    return model


def with_weights_of(original: Any, config: LMConfig) -> MambaLM:
    """Build our model with the weights of the one from `transformers`."""
    state = {k.replace("backbone.embeddings.", "backbone.embedding."): v for k, v in original.state_dict().items()}
    ours = MambaLM(config).eval()
    ours.load_state_dict(state)
    return ours
