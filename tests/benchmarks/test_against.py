"""ssm-bench against: ops of this checkout beside those of another one."""

from __future__ import annotations

import json

import pytest

from vlmamba.benchmarks import cli

OTHER = """
import torch

def causal_conv1d(x, weight, bias, activation, backend):
    assert backend == "torch" and torch.get_num_threads() == 1
    return x * weight.sum() + bias, None
"""


@pytest.mark.slow
def test_another_checkout_is_timed_in_turn_by_its_public_calls_alone(tmp_path, capsys):
    (tmp_path / "before" / "ssm_kernels").mkdir(parents=True)
    (tmp_path / "before" / "ssm_kernels" / "__init__.py").write_text(OTHER)
    out = tmp_path / "a.json"
    command = ["against", str(tmp_path / "before"), "--backend", "torch", "--shape", "tiny", "--rounds", "2"]
    cli.main([*command, "--op", "causal_conv1d", "ssd_step", "--out", str(out)])
    conv, step = json.loads(out.read_text())["cases"]
    assert [(row["impl"], row["mode"], row["time"]["calls"]) for row in conv["rows"]] == [
        (side, mode, 10) for mode in ("fwd", "fwd+bwd") for side in ("ours", "theirs")
    ]
    ours, theirs = step["rows"]
    assert ours["time"]["processor"] > 0 and "has no attribute 'ssd_step'" in theirs["missing"]
    said = capsys.readouterr()
    assert "causal_conv1d tiny  theirs" in said.out and said.err.count("round 2 of 2") == 2


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="ssm-bench: .* is no checkout of this project"):
        cli.main(["against", str(tmp_path)])
