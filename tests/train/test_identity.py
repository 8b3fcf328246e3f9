"""Identity of a run: the content of data and weights and every setting that changes the steps, and nothing else."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import nn

from tests.train.makers import tiny_vlm
from vlmamba.model import Tokenizer
from vlmamba.model.prompt import get_template
from vlmamba.train.config import RESUME_FREE, LoraConfig, StageConfig
from vlmamba.train.identity import differences, fingerprint, run_identity, weights_hash

STAGE = StageConfig("test", ("",), lr=0.01)
CHANGES = {
    "name": "other", "trainable": ("a",), "lr": 0.02, "epochs": 2.0, "batch_size": 32, "weight_decay": 0.1,
    "betas": (0.9, 0.95), "warmup_ratio": 0.1, "grad_clip": 2.0, "precision": "bf16", "seed": 1,
    "lora": LoraConfig(), "micro_batch_size": 2, "gradient_checkpointing": True, "context_parallel": 2, "workers": 3,
    "save_every": 7, "keep_last": 5, "max_loss": 9.0, "max_broken": 0.5,
}  # fmt: skip


@dataclass
class Item:
    x: torch.Tensor
    words: tuple


class Items:
    def __init__(self, n=200):
        self.items = [Item(torch.tensor([i]), ("a", i)) for i in range(n)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if self.items[index] is None:
            raise ValueError("broken")
        return self.items[index]


def identity(stage=STAGE, samples=None, data=()):
    torch.manual_seed(0)
    return run_identity(nn.Linear(2, 2), stage, samples or Items(), data)


def test_every_setting_is_either_compared_or_free():
    assert set(CHANGES) == {f.name for f in fields(StageConfig)}
    for name, value in CHANGES.items():
        found = differences(identity(), identity(replace(STAGE, **{name: value})))
        assert set(found) == (set() if name in RESUME_FREE else {name}), name


def test_data_are_identified_by_their_content(tmp_path):
    path = tmp_path / "train.json"
    path.write_text("[1]")
    first = identity(data=[fingerprint(path)])
    os.utime(path, (1, 1))
    os.replace(path, tmp_path / "moved.json")
    assert not differences(first, identity(data=[fingerprint(tmp_path / "moved.json")]))
    (tmp_path / "moved.json").write_text("[2]")
    (found,) = differences(first, identity(data=[fingerprint(tmp_path / "moved.json")])).values()
    assert "train.json (sha256 " in found and "moved.json (sha256 " in found


def test_changed_samples_are_detected_and_a_broken_one_may_be_repaired():
    first, others = identity(), Items()
    others.items[100] = None
    broken = identity(samples=others)
    assert not differences(first, broken) and not differences(broken, first)
    others.items[100] = Item(torch.tensor([100]), ("a", 101))
    assert differences(first, identity(samples=others)) == {
        "prepared samples": "64 compared in the checkpoint, 1 of them differ (images, tokenizer or processing) now"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_the_hash_of_weights_sees_every_bit_name_and_dtype(dtype):
    class One(nn.Module):
        def __init__(self, name, value):
            super().__init__()
            self.register_buffer(name, value)

    value = torch.zeros((), dtype=dtype)
    hashes = [weights_hash(One("a", value)), weights_hash(One("b", value)), weights_hash(One("a", value[None]))]
    changed = value.clone().view(-1)
    changed.view(torch.uint8)[0] = 1
    hashes.append(weights_hash(One("a", changed[0])))
    assert len(set(hashes)) == 4
    assert weights_hash(One("a", value.clone())) == hashes[0]


def test_the_template_of_a_model_is_part_of_it():
    tokenizer = Tokenizer.train(["a question", "an answer"], vocab_size=280)
    torch.manual_seed(0)
    model = tiny_vlm("vl-mamba", tokenizer)
    first = run_identity(model, STAGE, Items())
    model.template = get_template("caption")
    (found,) = differences(first, run_identity(model, STAGE, Items())).items()
    assert found[0] == "template" and "QUESTION" in found[1]
