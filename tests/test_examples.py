"""The scripts of examples/ run and show what they say."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_scans_continue_from_a_state():
    example = load("scan")
    assert example["mamba1"]() < 1e-4
    assert example["mamba2"]() < 1e-4


def test_training_on_packs_lowers_the_loss():
    losses = load("packed_training")["train"](30)
    assert losses[-1] < 0.6 * losses[0]


def test_truncated_bptt_carries_keys_across_windows():
    losses = load("truncated_bptt")["train"](150)
    assert sum(losses[-20:]) < 0.4 * sum(losses[:20])


def test_a_custom_connector_gets_gradients():
    norms = load("custom_connector")["train_step"]()
    assert set(norms) == {"in_proj.weight", "in_proj.bias", "A_log", "out_proj.weight", "out_proj.bias"}
    assert all(norm > 0 for norm in norms.values())


def test_a_finetuned_model_names_the_colors(tmp_path):
    assert load("finetune_vlm")["finetune"](tmp_path) == ["red", "green", "blue"]


def test_two_ranks_agree_with_one():
    command = [sys.executable, str(EXAMPLES / "context_parallel.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The ranks and gloo write to one pipe, so that a line may end in another's.
    for line in ("rank 0: steps 0 to 51, outputs and", "rank 1: steps 51 to 101, outputs and"):
        assert line in done.stdout


def test_a_served_model_answers(monkeypatch, capsys):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(sys, "argv", ["serve_and_ask.py"])
    runpy.run_path(str(EXAMPLES / "serve_and_ask.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("What color is it? ")


def test_code_of_others_runs_unchanged():
    done = subprocess.run(  # its own process: `mamba_ssm` is imported there
        [sys.executable, str(EXAMPLES / "drop_in.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "mamba_ssm.Mamba: (2, 64, 16)" in done.stdout


@pytest.mark.ptx
def test_a_kernel_of_others_is_emulated_and_verified():
    pytest.importorskip("triton")
    example = load("bring_your_kernel")
    assert example["emulate"]() > 0
    verdict = example["verify"](example["rms_norm"], "rms_norm", ("fp32",), target="sm_90")
    assert verdict.is_right, verdict


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 60


def test_the_notebook_runs_and_has_its_pictures():
    notebook = json.loads((EXAMPLES / "demo.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    smaller = {
        "SHORTEN = 1\n": "SHORTEN = 500\n",
        "QUESTIONS = 2000": "QUESTIONS = 80",
        'load("train")': 'load("train")[:2000]',
        'load("test")': 'load("test")[:200]',
    }
    for setting, small in smaller.items():
        assert setting in code
        code = code.replace(setting, small)
    # Its own process: the number of threads and matplotlib's figures are of a process.
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr
    assert "with images" in done.stdout
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
