"""ssm-bench integration: transformers' models with and without enable(), in turn, compared with each other."""

from __future__ import annotations

import json
import re
from typing import get_args

import pytest
import torch

from ssm_kernels.compat import mamba_ssm as compat
from ssm_kernels.integrations import transformers as hooks
from vlmamba.benchmarks import cli, integration, peers
from vlmamba.benchmarks.options import ModelType
from vlmamba.benchmarks.timing import Result

pytest.importorskip("transformers", minversion="5.23")

SMALL = ["--width", "64", "--length", "12", "--calls", "2"]


def test_every_model_type_that_enable_knows_is_measured_and_agrees(tmp_path, capsys):
    assert set(get_args(ModelType)) == set(hooks.MODEL_TYPES)
    out = tmp_path / "integration.json"
    types = list(hooks.MODEL_TYPES)
    cli.main(["integration", *types, *SMALL, "--layers", "2", "--mode", "fwd+bwd", "--out", str(out)])
    report = json.loads(out.read_text())
    assert (
        report["command"].startswith("ssm-bench integration mamba falcon_mamba") and "--layers 2" in report["command"]
    )
    assert [case["name"] for case in report["cases"]] == types
    for case in report["cases"]:
        assert case["shape"] == {"batch": 1, "length": 12, "width": 64, "layers": 2}
        assert [(row["impl"], row["mode"]) for row in case["rows"]] == [
            (side, "fwd+bwd") for side in ("ours", "transformers")
        ]
        assert all(row["time"]["calls"] == 2 for row in case["rows"])
        ours = case["rows"][0]
        assert ours["is_right"] and 0 < ours["gradient_error"] < 1e-4  # 0 would be one side called twice
    assert len(re.findall(r"transformers +fwd\+bwd", capsys.readouterr().out)) == len(types)
    assert out.with_suffix(".png").exists() and "from transformers" in out.with_suffix(".html").read_text()


def test_ours_runs_on_these_ops_and_transformers_does_not(monkeypatch):
    calls = []
    scan = compat.selective_scan_fn
    monkeypatch.setattr(compat, "selective_scan_fn", lambda *args: calls.append(1) or scan(*args))
    cli.main(["integration", "mamba", *SMALL, "--mode", "fwd", "--calls", "3"])
    assert len(calls) == 5  # a first call, a warm-up and three
    assert not hooks._originals


@pytest.mark.parametrize("model_type", ["mamba", "zamba2"])
def test_a_wrong_integration_is_caught(model_type, monkeypatch, capsys):
    def spoil(op):
        def spoiled(*args, **options):
            y = op(*args, **options)
            return y * torch.linspace(0.98, 1.02, y.shape[-1])  # a factor alone would be lost in Mamba-2's norm

        return spoiled

    for name in ("selective_scan_fn", "mamba_chunk_scan_combined"):
        monkeypatch.setattr(compat, name, spoil(getattr(compat, name)))
    with pytest.raises(SystemExit, match=f"{model_type}: not the results of transformers"):
        cli.main(["integration", model_type, *SMALL, "--mode", "fwd"])
    assert "WRONG" in capsys.readouterr().out


def test_a_negligible_gradient_is_compared_relative_to_the_largest():
    y, large, small = torch.ones(2), torch.full((2,), 1.0), torch.full((2,), 1e-9)
    want = Result(y, (large, small, None))
    assert integration.differences(Result(y, (large, 2 * small, None)), want, 1e-4)["is_right"]
    found = integration.differences(Result(y, (large * 1.01, small, None)), want, 1e-4)
    assert found["gradient_error"] == pytest.approx(0.01, rel=1e-3) and not found["is_right"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "100"], "width must be a multiple of 64, the width of a head; got 100"),
        (["--layers", "0"], "--layers must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["integration", *arguments])


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        cli.main(["integration"])
