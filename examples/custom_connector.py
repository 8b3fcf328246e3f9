"""A connector of your own: image features to language tokens by an SSD scan over rows and columns.

python examples/custom_connector.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ssm_kernels import CROSS, cross_ssd
from vlmamba.model import VLM, Tokenizer, Turn, collate
from vlmamba.train.recipes import tiny_config


class CrossSSDConnector(nn.Module):
    """SSD along the four directions of `CROSS`, with shared parameters.

    Args:
        vision_width: width of the patch features.
        lm_width: width of the language model.
        heads: H; N is the size of a state.
    """

    def __init__(self, vision_width: int, lm_width: int, heads: int = 4, N: int = 16):
        super().__init__()
        self.heads, self.sizes = heads, (lm_width, heads, N, N)
        self.in_proj = nn.Linear(vision_width, sum(self.sizes))
        self.A_log = nn.Parameter(torch.zeros(len(CROSS), heads))
        self.out_proj = nn.Linear(lm_width, lm_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, h, w, vision_width) to tokens (B, h * w, lm_width)."""
        features = features.unsqueeze(3).expand(-1, -1, -1, len(CROSS), -1)  # (B, h, w, K, vision_width), no copy
        x, dt, B, C = self.in_proj(features).split(self.sizes, dim=-1)
        x, B, C = x.unflatten(-1, (self.heads, -1)), B.unsqueeze(-2), C.unsqueeze(-2)  # (B, h, w, K, H, P), 1 group
        y = cross_ssd(x, F.softplus(dt), -self.A_log.exp(), B, C)  # (B, h, w, K, H, P)
        return self.out_proj(y.sum(3).flatten(3)).flatten(1, 2)


def train_step() -> dict[str, float]:
    """Put the connector into a VLM, take the gradients of one sample, and return the norm of each of its weights'."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["What is it? A circle."], vocab_size=280)
    model = VLM(tiny_config("ml-mamba", tokenizer.vocab_size), tokenizer)
    model.connector = CrossSSDConnector(model.vision.width, model.config.language.d_model)
    sample = model.prepare([Turn("user", "What is it?"), Turn("assistant", "A circle.")], Image.new("RGB", (64, 64)))
    model(collate([sample])).loss.backward()
    return {name: p.grad.norm().item() for name, p in model.connector.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    for name, norm in train_step().items():
        print(f"{name}: gradient of norm {norm:.1e}")
