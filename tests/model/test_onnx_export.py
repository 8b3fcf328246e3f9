"""Language models as ONNX graphs, run by onnxruntime."""

from __future__ import annotations

import pytest
import torch

from ssm_kernels import use_backend
from vlmamba import cli
from vlmamba.model import LMConfig, MambaLM, onnx_export
from vlmamba.model.onnx_export import export_onnx, named_parts

onnxruntime = pytest.importorskip("onnxruntime")
CONFIGS = {
    "mamba": LMConfig(16, 1, 9, d_state=4),
    "mamba2": LMConfig(16, 1, 9, "mamba2", d_state=4, headdim=8),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", [pytest.param("mamba", marks=pytest.mark.nightly), "mamba2"])
def test_prompts_and_steps_agree_with_the_model(kind, tmp_path, capsys):
    torch.manual_seed(0)
    lm = MambaLM(CONFIGS[kind])
    lm.save_pretrained(tmp_path / "lm")
    cli.main(["export", str(tmp_path / "lm"), "--onnx", str(tmp_path / "onnx")])
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'onnx' / 'step.onnx'}"
    prompt, step = (onnxruntime.InferenceSession(tmp_path / "onnx" / f"{name}.onnx") for name in ("prompt", "step"))
    names = [i.name for i in prompt.get_inputs()]
    assert names == ["input_ids", "past.0.conv", "past.0.ssm"]
    assert prompt.get_inputs()[0].shape == ["batch", "length"] and step.get_inputs()[0].shape == ["batch", 1]
    assert [o.name for o in step.get_outputs()] == ["logits", "present.0.conv", "present.0.ssm"]
    for batch, length in ((2, 7), (1, 150)):
        ids, state = torch.randint(9, (batch, length + 3)), lm.new_state(batch)
        past = [t.clone().numpy() for _, t in named_parts(state)]
        # The prompt in two parts, and three steps.
        for part in ids.split([length - 2, 2, 1, 1, 1], dim=1):
            session = step if part.shape[1] == 1 else prompt
            logits, *past = session.run(None, dict(zip(names, [part.numpy(), *past], strict=True)))
            with use_backend("torch"):
                want = lm(part, state=state).logits[:, -1]
            torch.testing.assert_close(torch.from_numpy(logits), want, rtol=1e-4, atol=1e-4)
            for got, (_, t) in zip(past, named_parts(state), strict=True):
                torch.testing.assert_close(torch.from_numpy(got), t, rtol=1e-4, atol=1e-4)


def test_missing_packages_and_devices_are_named(tmp_path, monkeypatch):
    lm = MambaLM(CONFIGS["mamba"])
    with pytest.raises(ValueError, match="lm must be on a CPU to be exported, got meta"):
        export_onnx(lm.to("meta"), tmp_path)
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx is not installed: pip install 'vl-mamba\[onnx\]'"):
        export_onnx(lm, tmp_path)
