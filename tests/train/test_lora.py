"""LoRA: nothing at first, learns alone, resumes, and is no longer there in the end."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.train.makers import qa_record, tokenizer_of
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM
from vlmamba.model.batch import collate
from vlmamba.model.config import LMConfig, VLMConfig
from vlmamba.model.quantize import dequantize_model
from vlmamba.train.config import StageConfig
from vlmamba.train.loop import train_stage
from vlmamba.train.lora import LoraConfig, LoraLinear, add_lora, merge_lora
from vlmamba.train.optim import freeze_all_but
from vlmamba.train.recipes import TINY_VISION
from vlmamba.train.samples import Conversations
from vlmamba.train.track import read_metrics

ALL = {"mamba": ("in_proj", "x_proj", "dt_proj", "out_proj"), "mamba2": ("in_proj", "out_proj")}
RECORDS = [qa_record(f"what is {i}", f"it is {i}") for i in range(8)]
STAGE = StageConfig("finetune", ("connector", "language_model"), lr=0.02, epochs=6, batch_size=4, save_every=2)


@pytest.fixture(params=ALL)
def model(request) -> VLM:
    torch.manual_seed(0)
    tokenizer = tokenizer_of(RECORDS)
    language = LMConfig(32, 2, tokenizer.vocab_size, request.param, d_state=8, headdim=16, chunk_size=16)
    return VLM(VLMConfig(language, (TINY_VISION,), ConnectorConfig("mlp"), template="qa"), tokenizer)


def lora(model, **changes) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 8.0, "targets": ALL[model.config.language.layer], **changes})


def batch(model):
    return collate([Conversations(RECORDS, model)[i] for i in range(4)])


def draw(model):
    """Changes as if they had been learned."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)


def test_at_first_nothing_is_changed(model):
    before = model(batch(model)).loss
    add_lora(model, lora(model))
    assert torch.equal(model(batch(model)).loss, before)
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert len(layers) == 2 * len(ALL[model.config.language.layer])


def test_every_target_changes_the_logits(model):
    model.double()
    for target in ALL[model.config.language.layer]:
        changed = copy.deepcopy(model)
        add_lora(changed, lora(model, targets=(target,)))
        draw(changed)
        assert not torch.allclose(changed(batch(model)).loss, model(batch(model)).loss, rtol=1e-7)


def test_merged_weights_have_the_same_logits_and_names(model):
    names = list(model.state_dict())
    add_lora(model, lora(model))
    draw(model)
    unmerged = model(batch(model)).loss
    merge_lora(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(batch(model)).loss, unmerged)


def test_only_the_changes_and_the_connector_learn(model):
    add_lora(model, lora(model))
    learning = freeze_all_but(model, STAGE.trainable)
    assert {n.split(".")[0] for n in learning} == {"connector", "language_model"}
    assert all("lora_" in n for n in learning if n.startswith("language_model"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    draw(model)
    model(batch(model)).loss.backward()
    assert all(p.grad is not None for n, p in learning.items() if "lora_" in n)
    assert all(p.grad is None for n, p in model.named_parameters() if n not in learning)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n not in learning)


def test_dropout_is_drawn_once_for_forward_and_backward(model):
    """A recomputation in the backward draws no new dropout: the gradient is that of the loss."""
    add_lora(model, lora(model, dropout=0.5))
    draw(model)
    model.double().train()
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters() if "lora_A" in n}

    def loss(step):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                if name in direction:
                    p += step * direction[name]
        torch.manual_seed(1)
        return moved, moved(batch(model)).loss

    moved, value = loss(0.0)
    torch.rand(7)  # the random state goes on between forward and backward
    value.backward()
    slope = sum((p.grad * direction[n]).sum() for n, p in moved.named_parameters() if n in direction)
    torch.testing.assert_close(slope.item(), (loss(1e-5)[1] - loss(-1e-5)[1]).item() / 2e-5, rtol=1e-3, atol=1e-6)


def test_a_stage_trains_resumes_and_saves_merged_weights(model, tmp_path):
    stage = replace(STAGE, lora=lora(model, dropout=0.1))
    start = copy.deepcopy(model)
    whole = copy.deepcopy(model)
    train_stage(whole, stage, Conversations(RECORDS, whole), collate, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(step, _):
        if step == 4:
            raise Stop

    cut = copy.deepcopy(model)
    with pytest.raises(Stop):
        train_stage(cut, stage, Conversations(RECORDS, cut), collate, tmp_path / "cut", on_step=stop)
    again = copy.deepcopy(model)
    train_stage(again, stage, Conversations(RECORDS, again), collate, tmp_path / "cut")
    finished = copy.deepcopy(model)
    train_stage(finished, stage, Conversations(RECORDS, finished), collate, tmp_path / "cut")

    losses = [m["loss"] for m in read_metrics(tmp_path / "whole")]
    assert losses[-1] < losses[0] - 0.3
    assert [m["loss"] for m in read_metrics(tmp_path / "cut")] == losses
    again.eval().save_pretrained(tmp_path / "model")
    loaded = VLM.from_pretrained(tmp_path / "model")
    for other in (whole, again, finished, loaded):
        state = other.state_dict()
        assert list(state) == list(start.state_dict())
        assert all(torch.equal(p, state[n]) for n, p in whole.state_dict().items())
    changed = {n for n, p in start.state_dict().items() if not torch.equal(p, whole.state_dict()[n])}
    inside = {n.split(".")[-2] for n in changed if n.startswith("language_model")}
    assert inside == set(ALL[model.config.language.layer])


def test_adapters_of_a_quantized_model_train_resume_and_are_merged(model, tmp_path):
    pytest.importorskip("torchao")
    stage = replace(STAGE, lora=lora(model, targets=("in_proj", "out_proj")))
    model.save_pretrained(tmp_path / "start")
    start = VLM.from_pretrained(tmp_path / "start", quantize="int4")
    names = set(start.state_dict())
    with pytest.raises(ValueError, match=r"trainable names language_model\S*, which is quantized"):
        train_stage(copy.deepcopy(start), STAGE, Conversations(RECORDS, start), collate, tmp_path / "refused")

    class Stop(Exception):
        pass

    def stop(step, trained):
        learning = {n for n, p in trained.named_parameters() if p.requires_grad}
        assert all("lora_" in n or n.startswith("connector") for n in learning)
        if step == 4:
            raise Stop

    whole, cut, again = (copy.deepcopy(start) for _ in range(3))
    train_stage(whole, stage, Conversations(RECORDS, whole), collate, tmp_path / "whole")
    with pytest.raises(Stop):
        train_stage(cut, stage, Conversations(RECORDS, cut), collate, tmp_path / "cut", on_step=stop)
    train_stage(again, stage, Conversations(RECORDS, again), collate, tmp_path / "cut")
    losses = [m["loss"] for m in read_metrics(tmp_path / "whole")]
    assert losses[-1] < losses[0] - 0.3
    assert [m["loss"] for m in read_metrics(tmp_path / "cut")] == losses
    # A checkpoint holds what is trained; the adapted layers are in floating point at the end, the others as before.
    assert (tmp_path / "whole" / "step-00000012").is_dir()
    adapted = {n for n in names if n.endswith(("in_proj.qdata", "out_proj.qdata")) and n.startswith("language_model")}
    assert names - set(again.state_dict()) == adapted | {n.replace("qdata", "scale") for n in adapted}
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in again.state_dict().items())
    dequantize_model(again)
    assert list(again.state_dict()) == list(model.state_dict())


def test_impossible_values_are_named(model):
    for change, message in (
        ({"rank": 0}, "rank of LoRA"),
        ({"alpha": 0.0}, "alpha of LoRA"),
        ({"dropout": 1.0}, "dropout of LoRA"),
        ({"targets": ("conv1d",)}, "targets of LoRA\\[0\\] must be one of 'in_proj', 'x_proj', 'dt_proj', 'out_proj'"),
        ({"targets": ()}, "targets of LoRA"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**change)
    if model.config.language.layer == "mamba2":
        with pytest.raises(ValueError, match=r"'x_proj' is in no layer .* which has \['in_proj', 'out_proj'\]"):
            add_lora(model, LoraConfig(targets=("x_proj",)))
    add_lora(model, lora(model))
    with pytest.raises(ValueError, match="has LoRA already"):
        add_lora(model, lora(model))
