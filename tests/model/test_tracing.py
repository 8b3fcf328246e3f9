"""Language models and connectors without values: on the meta device, under FakeTensorMode, compiled and exported."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from ssm_kernels import states
from vlmamba.connectors import ConnectorConfig, build_connector
from vlmamba.model import VLM, LMConfig, MambaLM, VLMConfig
from vlmamba.model.config import VisionConfig
from vlmamba.model.image import ImageProcessor
from vlmamba.model.vit import ViTConfig

LAYERS = {
    "mamba": LMConfig(d_model=16, n_layer=2, vocab_size=9, d_state=4),
    "mamba2": LMConfig(d_model=16, n_layer=2, vocab_size=9, layer="mamba2", d_state=4, headdim=8, chunk_size=16),
    # Of one layer: Mamba-3 is several ops, which take longer to trace.
    "mamba3": LMConfig(d_model=16, n_layer=1, vocab_size=9, layer="mamba3", d_state=4, headdim=8, chunk_size=16),
    "mamba3-mimo": LMConfig(16, 1, 9, "mamba3", d_state=4, headdim=8, chunk_size=16, mimo_rank=2),
}


@pytest.fixture(params=["mamba", "mamba2", "mamba3", pytest.param("mamba3-mimo", marks=pytest.mark.nightly)])
def lm(request) -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(LAYERS[request.param])


def test_without_values(lm):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert lm(torch.zeros(2, 5, dtype=torch.long)).logits.shape == (2, 5, 16)
    meta = lm.to("meta")(torch.zeros(2, 5, dtype=torch.long, device="meta"))
    assert meta.logits.shape == (2, 5, 16) and meta.logits.device.type == "meta"


def test_compiles_to_one_graph_with_dynamic_sizes(lm):
    compiled = torch.compile(lm, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 5), (3, 40)):
        ids = torch.arange(size[0] * size[1]).view(size) % 9
        torch.testing.assert_close(compiled(ids).logits, lm(ids).logits)


@pytest.mark.slow
def test_states_compile_and_carry_gradients(lm):
    lm.double()  # sums of gradients round otherwise in a graph
    compiled = torch.compile(lm, fullgraph=True, dynamic=True, backend="aot_eager")
    ids = torch.arange(24).view(2, 12) % 9
    before = states.detach(lm(ids[:, :7], return_state=True).state)
    runs = []
    for run in (compiled, lm):
        start = [type(layer)(*(t.clone().requires_grad_() for t in layer)) for layer in before]
        out = run(ids[:, 7:], state=start, return_state=True)
        loss = out.logits.square().sum() + sum(t.sum() for layer in out.state for t in layer)
        parts = [t for layer in start for t in layer]
        runs.append((out.state, torch.autograd.grad(loss, [*parts, *lm.parameters()])))
    torch.testing.assert_close(*runs)


def test_exports_with_dynamic_batch_and_length(lm):
    ids = torch.arange(60).view(2, 30) % 9
    dims = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=4096)}
    exported = torch.export.export(lm, (ids,), dynamic_shapes={"input_ids": dims}).module()
    for size in ((2, 30), (1, 7), (3, 70)):
        ids = torch.arange(size[0] * size[1]).view(size) % 9
        torch.testing.assert_close(exported(ids).logits, lm(ids).logits)
        with torch.no_grad():
            torch.testing.assert_close(exported(ids).logits, lm(ids).logits)


@pytest.mark.parametrize("kind", ["mlp", "vss-l2", "mamba2-advanced"])
@pytest.mark.slow
def test_connectors(kind):
    torch.manual_seed(0)
    config = ConnectorConfig(kind, d_state=4, headdim=8) if kind.startswith("mamba2") else ConnectorConfig(kind)
    connector = build_connector(config, 12, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert connector(torch.zeros(2, 3, 4, 12)).shape == (2, 12, 16)
    compiled = torch.compile(connector, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 3, 4), (1, 5, 2)):
        x = torch.randn(*size, 12)
        torch.testing.assert_close(compiled(x), connector(x))
    x = torch.randn(2, 3, 4, 12)
    exported = torch.export.export(connector, (x,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)).module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 4, 12)
        torch.testing.assert_close(exported(x), connector(x))
    assert connector.to("meta")(torch.zeros(2, 3, 4, 12, device="meta")).shape == (2, 12, 16)


class ImageBetween(nn.Module):
    """A VLM as a function of tensors: the logits of an image between two texts, (B, before + patches + after, V)."""

    def __init__(self, vlm: VLM):
        super().__init__()
        self.vlm = vlm

    def forward(self, images, before, after):
        features = self.vlm.connector(self.vlm.vision([images]))
        embed = self.vlm.language_model.embed
        embeds = torch.cat([embed(before), features, embed(after)], 1)
        return self.vlm.language_model(inputs_embeds=embeds).logits


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("layer", "connector"),
    [
        ("mamba", ConnectorConfig("mlp")),
        ("mamba", ConnectorConfig("vss-l2", d_state=4)),
        ("mamba2", ConnectorConfig("mamba2-advanced", d_state=4, headdim=8)),
        ("mamba3", ConnectorConfig("mamba2-advanced", d_state=4, headdim=8)),
        ("mamba3-mimo", ConnectorConfig("mlp")),
    ],
)
def test_a_vision_language_model_compiles_and_exports(layer, connector):
    torch.manual_seed(0)
    vision = VisionConfig(ViTConfig(8, 4, 12, 1, 2, 16, feature_layer=-1), ImageProcessor(8))
    config = VLMConfig(LAYERS[layer], (vision,), connector)
    model = ImageBetween(VLM(config).eval())

    def inputs(batch, before, after):
        texts = (torch.arange(batch * length).view(batch, length) % 9 for length in (before, after))
        return (torch.randn(batch, 3, 8, 8), *texts)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    batch = Dim("batch", min=1, max=64)
    lengths = ({0: batch, 1: Dim(name, min=2, max=4096)} for name in ("before", "after"))
    exported = torch.export.export(model, inputs(2, 3, 9), dynamic_shapes=({0: batch}, *lengths)).module()
    for size in ((2, 3, 9), (3, 2, 40)):
        example = inputs(*size)
        want = model(*example)
        torch.testing.assert_close(compiled(*example), want)
        torch.testing.assert_close(exported(*example), want)
