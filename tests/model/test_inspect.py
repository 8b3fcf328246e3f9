"""`inspect` reports of a checkpoint what loading and running it shows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssm_kernels import use_backend
from tests.makers import VISION
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, LMConfig, MambaLM, ViT, VLMConfig
from vlmamba.model.convert import convert
from vlmamba.model.formats.language import PUBLISHED
from vlmamba.model.generation.decoding import state_bytes
from vlmamba.model.inspect import flops_per_token, inspect
from vlmamba.model.load import load_model
from vlmamba.model.presets import PRESETS

LANGUAGES = {
    "mamba": LMConfig(32, 3, 101, "mamba", d_state=8),
    "mamba2": LMConfig(32, 2, 101, "mamba2", d_state=16, headdim=16, ngroups=2, tie_embeddings=False),
}


@pytest.fixture(params=["lm mamba", "lm mamba2", "vlm", "transformers", "state-spaces"])
def saved(request, tmp_path):
    """A folder and the format that it has."""
    torch.manual_seed(0)
    kind, _, layer = request.param.partition(" ")
    if kind == "vlm":
        model = VLM(VLMConfig(LANGUAGES["mamba2"], (VISION, VISION), ConnectorConfig("vss-l2", d_state=4)))
    else:
        model = MambaLM(LANGUAGES[layer or "mamba"])
    model.save_pretrained(tmp_path / "own")
    if kind not in ("transformers", "state-spaces"):
        return tmp_path / "own", "own"
    convert(tmp_path / "own", tmp_path / kind, kind)
    return tmp_path / kind, kind


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_inspect_reports_the_config_that_loading_finds(saved, dtype, monkeypatch):
    folder, layout = saved
    with monkeypatch.context() as unread:
        unread.setattr("vlmamba.model.weights._OneOpenFile.read", lambda *args: pytest.fail("a tensor was read"))
        report = inspect(folder, dtype)
    model = load_model(folder, dtype=dtype)
    parameters = {id(p): p for p in model.parameters()}.values()
    assert (report.format, report.model) == (layout, type(model).__name__)
    assert sum(report.parameters.values()) == sum(p.numel() for p in parameters)
    assert report.weight_bytes == sum(p.numel() * p.element_size() for p in parameters)
    for name, count in report.dtypes.items():
        assert count == sum(p.numel() for p in parameters if p.dtype == getattr(torch, name))
    for part, count in report.parameters.items():
        assert count == sum(p.numel() for p in model.get_submodule(part).parameters())
    lm = model.language_model if isinstance(model, VLM) else model
    assert report.state_bytes == state_bytes(lm.new_state(1))
    assert report.image_tokens == (16 if isinstance(model, VLM) else None)
    assert json.loads(json.dumps(report.to_json()))["parameters"]["total"] == sum(report.parameters.values())


def test_the_state_is_constant_and_shown(saved):
    folder, _ = saved
    report = inspect(folder)
    model = load_model(folder)
    lm = model.language_model if isinstance(model, VLM) else model
    for length in (1, 50, 300):
        state = lm.new_state(1)
        with torch.no_grad():
            lm(torch.ones(1, length, dtype=torch.int64), state=state)
        assert state_bytes(state) == report.state_bytes
    assert f"{report.state_bytes / 1024:.1f} KiB, whatever its length" in str(report)


def test_an_encoder_has_no_state(tmp_path):
    ViT(VISION.encoder).save_pretrained(tmp_path)
    report = inspect(tmp_path)
    assert report.model == "ViT"
    assert report.state_bytes is report.decode is report.image_tokens is None
    assert "state per sequence" not in str(report)
    with pytest.raises(ValueError, match="is a vision encoder, which generates no text"):
        load_model(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("config", LANGUAGES.values(), ids=LANGUAGES)
def test_operations_are_those_that_are_counted_in_a_run(config):
    """The counter sees matrix products: of a step all but convolution and scan, of which it sees Mamba-2's C h."""
    lm = MambaLM(config).eval()
    with use_backend("torch"), FlopCounterMode(display=False) as counter:  # kernels are not seen
        lm(torch.ones(1, 1, dtype=torch.int64), state=lm.new_state(1))
    decode = flops_per_token(config, prefill=False)
    seen = config.n_layer * 2 * 2 * config.d_model * config.d_state if config.layer == "mamba2" else 0
    assert counter.get_total_flops() == decode.projections + decode.head + seen
    length = 64
    with use_backend("torch"), FlopCounterMode(display=False) as counter:
        lm(torch.ones(1, length, dtype=torch.int64), logits_at=torch.tensor([length - 1]))
    prefill = flops_per_token(config, prefill=True)
    assert counter.get_total_flops() == length * prefill.projections + decode.head
    assert prefill.head == 0


def test_operations_of_published_sizes():
    """Twice the parameters, and the scan."""
    mamba = flops_per_token(LMConfig(2560, 64), prefill=False)
    assert mamba.projections + mamba.head == pytest.approx(2 * 2_768_345_600, rel=0.005)
    assert mamba.scan == 64 * 7 * 5120 * 16
    mamba2 = LMConfig(2560, 64, 50277, "mamba2", d_state=128, pad_vocab_size_multiple=16, chunk_size=256)
    step = flops_per_token(mamba2, prefill=False)
    assert step.projections + step.head == pytest.approx(2 * 2_702_599_680, rel=0.005)
    assert step.scan == 64 * 5 * 80 * 64 * 128
    with torch.device("meta"):
        lm = MambaLM(replace(mamba2, n_layer=1))
    assert 64 * state_bytes(lm.new_state(1)) == 64 * (655_360 + 3 * 5376) * 4


def test_weights_that_do_not_fit_are_named(tmp_path):
    MambaLM(LANGUAGES["mamba"]).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | {"n_layer": 4}))
    with pytest.raises(ValueError, match=r"missing: backbone.layers.3"):
        inspect(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder at"):
        inspect(tmp_path / "nowhere")


def test_a_preset_is_looked_at_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = inspect("vl-mamba-2.8b")
    language = PUBLISHED[PRESETS["vl-mamba-2.8b"].language].parameters
    assert sum(n for part, n in report.parameters.items() if part.startswith("language_model")) == language
    assert (report.format, report.image_tokens, list(report.dtypes)) == ("preset", 729, ["float32"])
    assert inspect("vl-mamba-2.8b", torch.bfloat16).weight_bytes < 0.51 * report.weight_bytes
