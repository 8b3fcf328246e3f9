"""Settings of the whole suite: property-based tests draw the same examples every time."""

from __future__ import annotations

import hypothesis
import torch

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)  # the suite runs in several processes
