"""Settings of the whole suite: property-based tests draw the same examples every time, and take theirs in turn."""

from __future__ import annotations

import hypothesis
import torch

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)
