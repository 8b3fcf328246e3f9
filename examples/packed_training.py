"""Training on texts of unequal length without padding: they are concatenated in one row.

python examples/packed_training.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlmamba.model import LMConfig, MambaLM

LETTERS = 16


def draw_texts(n: int) -> list[torch.Tensor]:
    """Draw texts of 3 to 40 tokens that count up from a random token, modulo LETTERS."""
    return [
        (torch.randint(LETTERS, ()) + torch.arange(length)) % LETTERS for length in torch.randint(3, 41, (n,)).tolist()
    ]


def pack(texts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack texts into tokens (1, T) and bounds `cu_seqlens` (len(texts) + 1,)."""
    lengths = torch.tensor([0, *map(len, texts)])
    return torch.cat(texts).unsqueeze(0), lengths.cumsum(0)


def next_tokens(tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Shift tokens (1, T) to the targets (T,); the last token of each text has none (-100)."""
    targets = tokens.flatten().roll(-1)  # (T,)
    targets[cu_seqlens[1:] - 1] = -100
    return targets


def train(n_steps: int = 60) -> list[float]:
    """Train a small Mamba-2 and return the loss of each step, in nats a token."""
    torch.manual_seed(0)
    lm = MambaLM(LMConfig(32, 2, LETTERS, "mamba2", d_state=16, headdim=16))
    optimizer, losses = torch.optim.AdamW(lm.parameters(), 3e-3), []
    for _ in range(n_steps):
        tokens, cu_seqlens = pack(draw_texts(16))
        logits = lm(tokens, cu_seqlens=cu_seqlens).logits  # (1, T, LETTERS)
        loss = F.cross_entropy(logits[0], next_tokens(tokens, cu_seqlens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        if step % 10 == 0:
            print(f"step {step}: {loss:.2f} nats a token")
