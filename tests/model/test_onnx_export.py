"""Language models as ONNX graphs, run by onnxruntime."""

from __future__ import annotations

import pytest
import torch

from ssm_kernels import states, use_backend
from ssm_kernels.export import decompositions
from ssm_kernels.modules import Mamba, Mamba2
from vlmamba import cli
from vlmamba.model import LMConfig, MambaLM, onnx_export
from vlmamba.model.onnx_export import export_onnx

onnxruntime = pytest.importorskip("onnxruntime")
CONFIGS = {
    "mamba": LMConfig(16, 1, 9, d_state=4),
    "mamba2": LMConfig(16, 1, 9, "mamba2", d_state=4, headdim=8),
    "mamba3": LMConfig(16, 1, 9, "mamba3", d_state=4, headdim=8),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba2", *(pytest.param(k, marks=pytest.mark.nightly) for k in ("mamba", "mamba3"))])
def test_prompts_and_steps_agree_with_the_model(kind, tmp_path, capsys):
    torch.manual_seed(0)
    lm = MambaLM(CONFIGS[kind])
    lm.save_pretrained(tmp_path / "lm")
    cli.main(["export", str(tmp_path / "lm"), "--onnx", str(tmp_path / "onnx")])
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'onnx' / 'step.onnx'}"
    prompt, step = (onnxruntime.InferenceSession(tmp_path / "onnx" / f"{name}.onnx") for name in ("prompt", "step"))
    names = [i.name for i in prompt.get_inputs()]
    parts = list(states.named(lm.new_state(1)))
    assert names == ["input_ids", *(f"past.{part}" for part in parts)]
    assert prompt.get_inputs()[0].shape == ["batch", "length"] and step.get_inputs()[0].shape == ["batch", 1]
    assert [o.name for o in step.get_outputs()] == ["logits", *(f"present.{part}" for part in parts)]
    for batch, length in ((2, 7), (1, 150)):
        ids, state = torch.randint(9, (batch, length + 3)), lm.new_state(batch)
        past = [t.clone().numpy() for t in states.named(state).values()]
        # The prompt in two parts, and three steps.
        for part in ids.split([length - 2, 2, 1, 1, 1], dim=1):
            session = step if part.shape[1] == 1 else prompt
            logits, *past = session.run(None, dict(zip(names, [part.numpy(), *past], strict=True)))
            with use_backend("torch"):
                want = lm(part, state=state).logits[:, -1]
            torch.testing.assert_close(torch.from_numpy(logits), want, rtol=1e-4, atol=1e-4)
            for got, t in zip(past, states.named(state).values(), strict=True):
                torch.testing.assert_close(torch.from_numpy(got), t, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize("mixer", [Mamba(16, d_state=4), Mamba2(16, d_state=4, headdim=8)], ids=["mamba", "mamba2"])
def test_mixers_alone_agree(mixer, tmp_path):
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=4096)}
    exported = torch.export.export(mixer.eval(), (torch.randn(2, 30, 16),), dynamic_shapes=(sizes,))
    exported = exported.run_decompositions(decompositions())
    torch.onnx.export(exported, (), tmp_path / "mixer.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "mixer.onnx")
    for size in ((2, 30, 16), (1, 7, 16), (3, 300, 16)):
        x = torch.randn(size)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad(), use_backend("torch"):
            torch.testing.assert_close(torch.from_numpy(got), mixer(x), rtol=1e-4, atol=1e-4)


def test_missing_packages_and_devices_are_named(tmp_path, monkeypatch):
    lm = MambaLM(CONFIGS["mamba"])
    with pytest.raises(ValueError, match="lm must be on a CPU to be exported, got meta"):
        export_onnx(lm.to("meta"), tmp_path)
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx is not installed: pip install onnx onnxscript"):
        export_onnx(lm, tmp_path)


def test_an_export_that_is_interrupted_leaves_no_file(tmp_path, monkeypatch):
    def write_half(exported, arguments, file, **options):
        file.write_bytes(b"half")
        if file.name == "step.onnx":
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", write_half)
    monkeypatch.setattr(onnx_export, "trace", lambda lm, graph: None)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(MambaLM(CONFIGS["mamba"]), tmp_path)
    assert not list(tmp_path.iterdir())
