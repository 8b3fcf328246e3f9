"""One step of the demo, both models, through the Triton kernels: the gradients of the PyTorch path."""

from __future__ import annotations

import pytest
import torch

from ssm_kernels import use_backend
from ssm_kernels.testing import is_interpreted
from tests.train.makers import tiny_vlm, tokenizer_of
from vlmamba.model.batch import collate
from vlmamba.train import easy_vqa
from vlmamba.train.recipes import FAMILIES
from vlmamba.train.samples import Conversations

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not is_interpreted(), reason="the kernels need Triton's interpreter here"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_a_step_of_the_demo_has_the_gradients_of_the_torch_path(family):
    questions = easy_vqa.load("train")[:40]
    tokenizer = tokenizer_of(questions, 300)
    torch.manual_seed(0)
    model = tiny_vlm(family, tokenizer)
    samples = Conversations(easy_vqa.conversations(questions, 1), model)
    batch = collate([samples[0], samples[1]])  # two conversations about images, packed

    found = {}
    for backend in ("torch", "auto"):
        with use_backend(backend):
            out = model(batch)
            out.loss.backward()
        found[backend] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[backend]["loss"] = out.loss.detach()
        model.zero_grad()
    assert len(found["torch"]) > 20
    assert found["auto"].keys() == found["torch"].keys()
    for name, want in found["torch"].items():
        error = (found["auto"][name] - want).abs().max()
        assert error <= 1e-4 * want.abs().max() + 1e-7, name
