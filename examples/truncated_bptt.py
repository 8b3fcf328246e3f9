"""Truncated back-propagation through time: one stream a row, read window by window, with the state carried on.

    python examples/truncated_bptt.py

The target at each step is the last key that the row has shown. Keys are rarer than one a window, so a model without
the carried state has to guess.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssm_kernels import states
from vlmamba.model import LMConfig, MambaLM

ROWS, WINDOW, KEYS, GAP = 16, 16, 7, 32
"""Streams, steps of a window, kinds of keys, and steps between keys on average."""


def draw_window(last_keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens (ROWS, WINDOW), 0 or a key, and the last key at each step, starting from `last_keys` (ROWS,)."""
    keys = torch.randint(1, KEYS + 1, (ROWS, WINDOW))
    tokens = keys.where(torch.rand(ROWS, WINDOW) < 1 / GAP, 0)
    targets = []
    for step in tokens.unbind(1):
        last_keys = step.where(step > 0, last_keys)
        targets.append(last_keys)
    return tokens, torch.stack(targets, dim=1)


def train(n_windows: int = 300, lr: float = 1e-2, carry: bool = True) -> list[float]:
    """Train a small model, one optimizer step a window, and return the loss of each in nats a step."""
    torch.manual_seed(0)
    lm = MambaLM(LMConfig(32, 1, KEYS + 1, d_state=16))
    optimizer = torch.optim.AdamW(lm.parameters(), lr)
    state, last_keys, losses = lm.new_state(ROWS), torch.zeros(ROWS, dtype=torch.int64), []
    for _ in range(n_windows):
        tokens, targets = draw_window(last_keys)
        out = lm(tokens, state=state, return_state=True)
        loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        # The values are carried on; the graph ends here. `states.reset(state, mask)` starts rows anew.
        state, last_keys = states.detach(out.state) if carry else lm.new_state(ROWS), targets[:, -1]
    return losses


if __name__ == "__main__":
    for i, pair in enumerate(zip(train(), train(carry=False), strict=True)):
        if i % 20 == 0:
            print("window {}: {:.2f} nats a step, {:.2f} without a carried state".format(i, *pair))
