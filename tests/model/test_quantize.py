"""Quantized weights: what is quantized, how far off it is, saving, loading, converting, and what is refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssm_kernels import use_backend
from ssm_kernels.modules import QuantizedEmbedding, QuantizedLinear, QuantizedMatrix
from tests.train.makers import qa_record, tokenizer_of
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, MambaLM, ViT
from vlmamba.model.config import LMConfig, ViTConfig, VLMConfig
from vlmamba.model.convert import convert
from vlmamba.model.inspect import inspect
from vlmamba.model.load import load_model
from vlmamba.model.quantize import check_devices, dequantize_model, pack_halves, quantize_matrix, replace_matrices
from vlmamba.train.recipes import TINY_VISION

pytest.importorskip("torchao")
IDS = torch.tensor([[5, 3, 1, 7, 2, 9, 4]])


def make_lm(layer="mamba", width=32, **options) -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(LMConfig(width, 2, 20, layer, d_state=8, headdim=16, chunk_size=16, **options)).eval()


@pytest.fixture
def vlm(tmp_path) -> VLM:
    torch.manual_seed(0)
    tokenizer = tokenizer_of([qa_record("what is it", "a box")])
    language = LMConfig(32, 2, tokenizer.vocab_size, d_state=8)
    return VLM(VLMConfig(language, (TINY_VISION,), ConnectorConfig("mlp"), template="qa"), tokenizer).eval()


def bits_of(model) -> dict[str, int]:
    return {name: m.bits for name, m in model.named_modules() if isinstance(m, QuantizedMatrix)}


@pytest.mark.parametrize("bits", [8, 4])
def test_a_matrix_is_the_product_of_integers_and_scales(bits):
    torch.manual_seed(0)
    weight = torch.randn(6, 96)
    matrix = QuantizedLinear(96, 6, bits)
    matrix.qdata.data, matrix.scale.data = quantize_matrix(weight, bits)
    got = matrix.dequantize(torch.float32)
    # Half a step at most, but for what a group's scale leaves out of its range in favor of the others.
    step = matrix.scale.float().repeat_interleave(96 // matrix.scale.shape[1], 1)
    inside = weight.abs() <= (127 if bits == 8 else 7) * step
    assert inside.float().mean() > 0.9 and ((got - weight).abs() <= 0.501 * step)[inside].all()
    assert (got - weight).norm() / weight.norm() < (0.01 if bits == 8 else 0.1)
    rows = torch.tensor([[4, 0], [4, 5]])
    assert torch.equal(matrix.dequantize(torch.float32, rows), got[rows])
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(matrix.dequantize(dtype), got.to(dtype), rtol=1e-2, atol=1e-6)


def test_halves_are_in_the_order_that_the_layer_says():
    integers = torch.randint(-8, 8, (3, 64), dtype=torch.int8)
    packed = pack_halves(integers)
    assert packed.shape == (3, 32) and packed.dtype == torch.uint8
    for group in range(2):
        for j in range(16):
            byte = packed[:, group * 16 + j].int()
            assert torch.equal((byte & 15) - 8, integers[:, group * 32 + j].int())
            assert torch.equal((byte >> 4) - 8, integers[:, group * 32 + j + 16].int())


def test_gradients_pass_a_quantized_layer_which_saves_no_weight():
    torch.manual_seed(0)
    layer = QuantizedLinear(64, 8, 4, bias=True)
    layer.qdata.data, layer.scale.data = quantize_matrix(torch.randn(8, 64), 4)
    x = torch.randn(3, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert max(saved, default=0) < 8 * 64
    (y * torch.arange(8.0)).sum().backward()
    torch.testing.assert_close(x.grad, torch.arange(8.0).expand(3, 8) @ layer.dequantize(torch.float32))
    assert layer.bias.grad is not None and layer.qdata.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, torch.float32), (8, torch.bfloat16), (8, torch.float16), (4, torch.float16)]
)
def test_a_product_is_that_of_the_weights(bits, dtype):
    """Also where a sum of integers times activations would exceed float16."""
    layer = QuantizedLinear(96, 5, bits, bias=True)
    layer.qdata.data = torch.full_like(layer.qdata, 127 if bits == 8 else 255)
    layer.scale.data = torch.linspace(1e-4, 1e-3, layer.scale.numel()).view(layer.scale.shape).bfloat16()
    x = 10 * torch.ones(2, 3, 96)
    want = x @ layer.dequantize(torch.float32).T
    with torch.no_grad():
        got = layer(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)
    torch.testing.assert_close(layer(x.to(dtype).requires_grad_()), got)


@pytest.mark.parametrize("layer", ["mamba", "mamba2", "mamba3"])
@pytest.mark.parametrize(("quantize", "bits", "tolerance"), [("int8", 8, 0.02), ("int4", 4, 0.2)])
def test_logits_are_close_and_a_reload_has_the_same(layer, quantize, bits, tolerance, tmp_path):
    lm = make_lm(layer)
    lm.save_pretrained(tmp_path / "full")
    lean = MambaLM.from_pretrained(tmp_path / "full", quantize=quantize)
    want = {"backbone.embedding": 8, "lm_head": 8}
    for i in range(2):
        want |= {f"backbone.layers.{i}.mixer.{name}": bits for name in ("in_proj", "out_proj")}
        want |= {f"backbone.layers.{i}.mixer.x_proj": 8} if layer == "mamba" else {}
    assert bits_of(lean) == want
    # Everything else is as it was, bit for bit.
    full = lm.state_dict()
    same = {n: t for n, t in lean.state_dict().items() if n in full}
    assert same and all(torch.equal(t, full[n]) for n, t in same.items())
    assert lean.backbone.embedding.qdata is lean.lm_head.qdata
    with torch.no_grad():
        logits = lean(IDS).logits
        assert (logits - lm(IDS).logits).norm() < tolerance * lm(IDS).logits.norm()
        lean.save_pretrained(tmp_path / "lean")
        again = load_model(tmp_path / "lean")
        assert bits_of(again) == want and torch.equal(again(IDS).logits, logits)
        assert again.backbone.embedding.qdata is again.lm_head.qdata
        half = MambaLM.from_pretrained(tmp_path / "lean", dtype=torch.bfloat16)
        assert half.lm_head.scale.dtype == torch.bfloat16 and half.embed(IDS).dtype == torch.bfloat16
        dequantize_model(again)
        assert bits_of(again) == {} and again.lm_head.weight is again.backbone.embedding.weight
        torch.testing.assert_close(again(IDS).logits, logits)
    assert list(again.state_dict()) == list(full)


def test_decoding_steps_read_the_integers(tmp_path):
    pytest.importorskip("numba")
    make_lm().save_pretrained(tmp_path)
    lean = MambaLM.from_pretrained(tmp_path, quantize="int4")
    assert lean.obstacle_to_fusing() is None
    with torch.no_grad(), use_backend("reference"):
        want, state = lean(IDS).logits, lean.new_state(1)
        step = lean.fuse_step(state)
        got = torch.stack([step(lean.embed(IDS[:, t])).clone() for t in range(IDS.shape[1])], 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    lean.float()  # the kernel takes scales as they are stored
    assert "scales of its quantized weights" in lean.obstacle_to_fusing()


def test_encoders_are_quantized_and_connectors_are_not(vlm, tmp_path):
    vlm.save_pretrained(tmp_path / "full")
    convert(tmp_path / "full", tmp_path / "lean", quantize="int4")
    lean = VLM.from_pretrained(tmp_path / "lean")
    direct = VLM.from_pretrained(tmp_path / "full", quantize="int4")
    assert all(torch.equal(t, direct.state_dict()[n]) for n, t in lean.state_dict().items())
    bits = bits_of(lean)
    assert {n.split(".")[0] for n in bits} == {"language_model", "vision"}
    assert bits["vision.encoders.0.blocks.0.attn.qkv"] == 4
    assert lean.vision.encoders[0].blocks[0].attn.qkv.bias is not None
    assert "integers of 4 and 8 bits" in (tmp_path / "lean" / "README.md").read_text()
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "lean")}
    assert size["lean"] < 0.5 * size["full"]
    reports = [inspect(tmp_path / name) for name in ("full", "lean")]
    assert reports[0].parameters == reports[1].parameters
    assert reports[1].weight_bytes < 0.5 * reports[0].weight_bytes
    vit = lean.vision.encoders[0]
    vit.save_pretrained(tmp_path / "vit")
    assert bits_of(ViT.from_pretrained(tmp_path / "vit")) == bits_of(vit)


def test_rows_that_groups_do_not_divide_have_8_bits_and_are_named_once(tmp_path, caplog):
    vit = ViT(ViTConfig(16, 8, 32, 2, 2, 72, feature_layer=-1))
    vit.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        lean = ViT.from_pretrained(tmp_path, quantize="int4")
    assert {n for n, bits in bits_of(lean).items() if bits == 8} == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    assert [r.getMessage() for r in caplog.records] == [
        "2 matrices have rows that groups of 32 do not divide, and 8 bits: ['blocks.0.mlp.fc2', 'blocks.1.mlp.fc2']"
    ]


def test_impossible_quantizations_are_refused_by_name(tmp_path, monkeypatch):
    make_lm().save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="quantize must be one of 'int8', 'int4'; got 'int3'"):
        MambaLM.from_pretrained(tmp_path / "full", quantize="int3")
    with pytest.raises(ValueError, match="quantize is for to = 'own'"):
        convert(tmp_path / "full", tmp_path / "new", "transformers", quantize="int8")
    convert(tmp_path / "full", tmp_path / "lean", quantize="int8")
    with pytest.raises(ValueError, match="lean is quantized already"):
        MambaLM.from_pretrained(tmp_path / "lean", quantize="int4")
    with pytest.raises(ValueError, match="lean is quantized, which to = 'state-spaces' cannot hold"):
        convert(tmp_path / "lean", tmp_path / "new", "state-spaces")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="not finite"):
        quantize_matrix(torch.full((2, 32), torch.nan), 8)
    with pytest.raises(ValueError, match="columns must be a multiple of 32 with 4 bits, got 33"):
        QuantizedEmbedding(3, 33, 4)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 2"):
        QuantizedLinear(32, 3, 2)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="the device is there")
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_device_that_cannot_run_the_weights_is_named(quantize, tmp_path):
    make_lm().save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"device mps cannot run weights of \d bits: Could not run"):
        MambaLM.from_pretrained(tmp_path / "full", quantize=quantize, device_map="mps")
    MambaLM.from_pretrained(tmp_path / "full", quantize=quantize).save_pretrained(tmp_path / "lean")
    with pytest.raises(ValueError, match=r"device mps cannot run weights of \d bits"):
        MambaLM.from_pretrained(tmp_path / "lean", device_map={"": "cpu", "backbone.layers.1": "mps"})
    # Only matrices count.
    with pytest.raises(Exception, match="^(?!device mps cannot run weights)"):
        MambaLM.from_pretrained(tmp_path / "lean", device_map={"": "cpu", "backbone.norm_f": "mps"})


def test_a_warning_names_devices_where_weights_only_save_memory(caplog):
    lm = make_lm()
    replace_matrices(lm, {"backbone.embedding": 8, "lm_head": 8, "backbone.layers.0.mixer.in_proj": 4})
    with caplog.at_level(logging.WARNING), FakeTensorMode():
        check_devices(lm, "cpu")
        assert not caplog.records
        for _ in range(2):
            check_devices(lm, {"": "cuda:6", "backbone.embedding": "cpu"})
    (record,) = caplog.records
    assert record.getMessage().startswith("quantized weights on cuda:6 save memory, not time: a layer makes")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_runs_on_a_gpu(bits):
    """By shapes, dtypes and devices, of a GPU that need not be there."""
    with torch.no_grad(), FakeTensorMode(), torch.device("cuda"):
        layer = QuantizedLinear(64, 5, bits, bias=True)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            y = layer(torch.zeros(2, 64, dtype=dtype))
            assert y.device.type == "cuda" and y.dtype == dtype and y.shape == (2, 5)


def test_without_torchao_a_quantized_model_loads_and_quantizing_says_what_to_install(tmp_path, monkeypatch):
    from vlmamba.model import quantize

    make_lm().save_pretrained(tmp_path / "full")
    convert(tmp_path / "full", tmp_path / "lean", quantize="int8")
    quantize._torchao.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    assert bits_of(MambaLM.from_pretrained(tmp_path / "lean"))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torchao>="):
        MambaLM.from_pretrained(tmp_path / "full", quantize="int8")
    monkeypatch.undo()
    quantize._torchao.cache_clear()


def test_a_copy_and_a_move_keep_tied_matrices_tied(tmp_path):
    make_lm().save_pretrained(tmp_path)
    lean = MambaLM.from_pretrained(tmp_path, quantize="int8")
    for other in (copy.deepcopy(lean), lean.bfloat16()):
        assert other.backbone.embedding.qdata is other.lm_head.qdata
