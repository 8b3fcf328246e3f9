"""The plan of a stage: counts that are exact, estimates held to what is measured, faults found before training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ssm_kernels import use_backend
from tests.train.makers import qa_record, tiny_vlm, tokenizer_of
from vlmamba.model import VLM
from vlmamba.model.batch import collate
from vlmamba.model.config import LMConfig
from vlmamba.model.lm import MambaLM
from vlmamba.model.presets import PRESETS
from vlmamba.train import plan
from vlmamba.train.lora import LoraConfig
from vlmamba.train.plan import SampleSize, disk_problem, make_plan, measure
from vlmamba.train.recipes import ML_MAMBA, SMALL, VL_MAMBA, tiny_config
from vlmamba.train.samples import Conversations

SIZE = SampleSize(256, tokens=800, targets=100, views=0.9)


def test_the_published_sizes_are_planned_without_weights():
    align = make_plan(PRESETS["vl-mamba-2.8b"].config, VL_MAMBA.align, 558_128, SIZE)
    assert align.parameters["language_model"] == (0, 2_768_345_600)
    assert align.parameters["vision"][0] == 0 and align.parameters["connector"][1] == 0
    assert align.n_steps == round(558_128 / 256)
    finetune = make_plan(PRESETS["vl-mamba-2.8b"].config, VL_MAMBA.finetune, 665_298, SIZE)
    assert finetune.parameters["language_model"] == (2_768_345_600, 0)
    assert finetune.tokens_an_epoch == 800 * 665_298
    trained = sum(n for n, _ in finetune.parameters.values())
    assert (finetune.memory.gradients, finetune.memory.optimizer) == (4 * trained, 8 * trained)
    text = str(finetune)
    for part in (
        "2,768,345,600 trainable",
        "412,987,248 frozen",
        "5,198 (1 epoch of 665,298",
        "16 per device",
    ):
        assert part in text


def test_devices_share_what_is_sharded_and_keep_the_batch():
    one, eight = (make_plan(PRESETS["vl-mamba-2.8b"].config, VL_MAMBA.finetune, 1000, SIZE, devices=n) for n in (1, 8))
    assert eight.memory.optimizer == one.memory.optimizer // 8
    assert eight.memory.activations == one.memory.activations
    assert eight.n_steps == one.n_steps
    assert "128 samples: 8 devices, micro batches of 8, 2 per device" in str(eight)
    with pytest.raises(ValueError, match="divisible by the 3 devices, got 128"):
        make_plan(PRESETS["vl-mamba-2.8b"].config, VL_MAMBA.finetune, 1000, SIZE, devices=3)


def test_devices_that_split_batches_share_activations_and_not_samples():
    model = PRESETS["vl-mamba-2.8b"].config
    apart, split = (
        make_plan(model, replace(VL_MAMBA.finetune, context_parallel=n), 1000, SIZE, devices=8) for n in (1, 4)
    )
    assert split.memory.activations == round(apart.memory.activations / 4)
    assert "128 samples: 8 devices, each batch split over 4, micro batches of 8, 8 per device" in str(split)
    with pytest.raises(ValueError, match="context_parallel must divide the 8 ranks, got 3"):
        make_plan(model, replace(VL_MAMBA.finetune, context_parallel=3), 1000, SIZE, devices=8)


def test_checkpointing_and_lora_take_less():
    model = PRESETS["ml-mamba-3b"].config
    whole = make_plan(model, replace(ML_MAMBA.finetune, gradient_checkpointing=False), 1000, SIZE)
    less = make_plan(model, ML_MAMBA.finetune, 1000, SIZE)
    assert less.memory.activations < 0.4 * whole.memory.activations
    least = make_plan(model, replace(ML_MAMBA.finetune, lora=LoraConfig()), 1000, SIZE)
    trained, frozen = least.parameters["language_model"]
    assert frozen == 2_702_599_680
    assert trained == 64 * 16 * (2560 + 10576 + 5120 + 2560)
    assert least.memory.optimizer < 0.1 * less.memory.optimizer
    assert least.flops_per_token < 0.75 * less.flops_per_token


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_layers_memory_is_what_they_keep(layer, bf16):
    """From the difference of four layers and two, and of 512 tokens and 256: nothing but the layers' share a token."""

    def kept(n_layer: int, n_tokens: int) -> int:
        torch.manual_seed(0)
        model = MambaLM(LMConfig(128, n_layer, 100, layer, d_state=16 if layer == "mamba" else 64))
        hidden = torch.randn(1, n_tokens, 128, requires_grad=True)

        def run():
            # The plan is of the PyTorch backend: compiled CPU kernels save less.
            with use_backend("torch"), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return model(inputs_embeds=hidden, logits_at=torch.arange(1))

        run()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            held = run()
        del held
        return sum(e.self_cpu_memory_usage for e in measured.key_averages())

    a_token = ((kept(4, 512) - kept(2, 512)) - (kept(4, 256) - kept(2, 256))) / 2 / 256
    config = LMConfig(128, 4, 100, layer, d_state=16 if layer == "mamba" else 64)
    assert plan._layer_bytes(config, 2 if bf16 else 4) == pytest.approx(a_token, rel=0.15)


RECORDS = [qa_record(f"what is {i} and {i}", "a number " * (i % 3 + 1)) for i in range(40)]


@pytest.fixture
def tiny() -> VLM:
    return tiny_vlm("ml-mamba", tokenizer_of(RECORDS))


def test_samples_are_counted_exactly_where_all_are_seen(tiny):
    samples = Conversations(RECORDS, tiny)
    batch = collate([samples[i] for i in range(40)])
    size = measure(samples)
    assert (size.n_seen, size.tokens * 40, size.views) == (40, batch.n_tokens, 0)
    assert size.targets * 40 == pytest.approx(batch.n_targets)
    assert measure(samples, 10).n_seen == 10


def test_a_broken_sample_is_found(tiny, tmp_path):
    broken = [*RECORDS[:5], replace(RECORDS[5], images=(tmp_path / "gone.png",))]
    with pytest.raises((ValueError, OSError), match="gone.png"):
        measure(Conversations(broken, tiny))


def test_operations_are_those_of_the_matrix_products():
    """Products of the encoder and of the language model's projections and head, counted by PyTorch."""
    model = VLM(tiny_config("vl-mamba", 300))
    images = torch.randn(2, 3, 48, 48)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.vision([images])
    patches = 2 * 36 * 2 * 3 * 64 * 8 * 8  # of the embedding of patches, left out
    assert 2 * plan._encoder_flops(model.config.vision[0]) == counter.get_total_flops() - patches
    text = SampleSize(1, tokens=1000, targets=10, views=0)
    lm = model.config.language
    head = 2 * 64 * lm.padded_vocab_size * 10
    per_token = sum(
        2 * m.weight.numel() for n, m in model.language_model.backbone.named_modules() if hasattr(m, "in_features")
    )
    frozen, learning = (
        1000 * make_plan(model.config, s, 10, text).flops_per_token for s in (SMALL.align, SMALL.finetune)
    )
    assert learning == pytest.approx(1.5 * frozen)
    assert 3 * (per_token * 1000 + head) < learning < 1.6 * 3 * (per_token * 1000 + head)


def test_a_disk_too_small_is_a_problem(tiny, tmp_path, monkeypatch):
    made = make_plan(tiny.config, SMALL.finetune, 40, SIZE)
    assert disk_problem(tmp_path / "new" / "run", [made]) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "checkpoints and model take" in disk_problem(tmp_path / "new" / "run", [made])
