"""The scripts of examples/ run and show what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_truncated_bptt_carries_keys_across_parts():
    train = runpy.run_path(str(EXAMPLES / "truncated_bptt.py"))["train"]
    losses = train(n_pieces=150)
    assert sum(losses[-20:]) < 0.4 * sum(losses[:20])
