"""Small models of `transformers` with random weights, and ours with the same weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from vlmamba.model import LMConfig, MambaLM


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
