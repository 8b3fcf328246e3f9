"""Samples packed in one row give the loss and the gradients of samples run alone."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.train.makers import tiny_vlm
from vlmamba.model import Tokenizer, Turn, collate
from vlmamba.train.recipes import FAMILIES
from vlmamba.train.records import Record
from vlmamba.train.samples import Conversations

WORDS = ("what", "color", "is", "the", "shape", "red", "blue", "circle", "no")
TOKENIZER = Tokenizer.train(WORDS, 300)


@pytest.fixture
def records(tmp_path):
    """Five conversations of 1 to 4 turns and of all lengths, three of them about images."""
    torch.manual_seed(1)
    made = []
    for i, (n_turns, n_words, about_image) in enumerate([(1, 2, True), (3, 9, False), (4, 3, True), (1, 1, False),
                                                         (2, 17, True)]):  # fmt: skip
        path = tmp_path / f"{i}.png"
        Image.fromarray(torch.randint(0, 256, (60, 50, 3), dtype=torch.uint8).numpy()).save(path)
        text = [" ".join(WORDS[(i + k) % len(WORDS)] for k in range(n_words + t)) for t in range(2 * n_turns)]
        turns = tuple(Turn(("user", "assistant")[t % 2], words) for t, words in enumerate(text))
        made.append(Record(turns, (path,) if about_image else ()))
    return made


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_have_the_loss_and_gradients_of_samples_alone(family, records):
    torch.manual_seed(0)
    model = tiny_vlm(family, TOKENIZER).double()
    data = Conversations(records, model)
    samples = [data[i] for i in range(len(data))]
    samples = [type(s)(s.input_ids, s.labels, tuple(i.to(torch.float64) for i in s.images)) for s in samples]
    packed = collate(samples)
    assert packed.n_tokens == sum(len(s.input_ids) for s in samples)  # no padding
    assert len({len(s.input_ids) for s in samples}) == len(samples)

    out = model(packed)
    out.loss.backward()
    together = gradients(model)

    n_targets, loss = 0, 0.0
    for sample in samples:
        alone = model(collate([sample]))
        (alone.loss * alone.n_targets).backward()
        n_targets += alone.n_targets
        loss += alone.loss.item() * alone.n_targets
    apart = {name: g / n_targets for name, g in gradients(model).items()}

    assert out.n_targets == n_targets == packed.n_targets
    assert out.loss.item() == pytest.approx(loss / n_targets, rel=1e-12)
    assert together.keys() == apart.keys() and {n.split(".")[0] for n in apart} == {
        "vision", "connector", "language_model",
    }  # fmt: skip
    for name, gradient in together.items():
        # A is float32 in a model of any dtype, and so are the sums of its gradient.
        bound = 1e-6 if "A_log" in name else 1e-11
        assert (gradient - apart[name]).norm() <= bound * apart[name].norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_packing_does_not_matter_and_nothing_crosses_a_bound(family, records):
    torch.manual_seed(0)
    model = tiny_vlm(family, TOKENIZER)
    data = Conversations(records, model)
    losses = [model(collate([data[i] for i in order])).loss.item() for order in ([0, 1, 2, 3, 4], [3, 4, 1, 0, 2])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    embeds = model.embed(collate([data[1], data[2]]))
    length = len(data[1].input_ids)
    bounds = torch.tensor([0, length, embeds.shape[1]], dtype=torch.int32)
    other = embeds.clone()
    other[:, :length] += 1.0
    logits, changed = (model.language_model(inputs_embeds=e, cu_seqlens=bounds).logits for e in (embeds, other))
    assert torch.equal(logits[:, length:], changed[:, length:])
    assert not torch.equal(logits[:, :length], changed[:, :length])
