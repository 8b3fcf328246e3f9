"""Commands and examples name an optional package that is missing, and how to install it, before they do anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
VLMAMBA, BENCH = ["-m", "vlmamba"], ["-m", "vlmamba.benchmarks.cli"]
HIDE = "import os, sys\nsys.modules[os.environ['HIDDEN']] = None\n"
"""Text of the `sitecustomize` of a process, and of those that it starts."""
SERVE = "pip install fastapi uvicorn prometheus_client"


@pytest.mark.parametrize(
    ("package", "command", "message"),
    [
        ("transformers", [str(EXAMPLES / "drop_in.py")], "pip install 'transformers>=5.20' accelerate peft"),
        ("triton", [str(EXAMPLES / "bring_your_kernel.py")], "pip install triton"),
        ("fastapi", [str(EXAMPLES / "serve_and_ask.py")], SERVE),
        ("easy_vqa", [*VLMAMBA, "data", "easy-vqa", "data"], "pip install easy-vqa"),
        ("matplotlib", [*VLMAMBA, "demo", "--output", "demo"], "pip install matplotlib"),
        ("matplotlib", [*VLMAMBA, "reproduce", "vl-mamba-connector", "--miniature"], "pip install matplotlib"),
        ("triton", [*BENCH, "compile-report", "rms_norm", "--quick"], "pip install triton"),
        ("triton", [*BENCH, "emulate", "rms_norm"], "pip install triton"),
        ("triton", [*BENCH, "machine-code", "ssd"], "pip install triton"),
        ("torchao", [*BENCH, "decode", "--quantize", "int8"], "pip install 'torchao>=0.18'"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else None,
)
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(package, command, message, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HIDDEN": package},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and message in done.stderr.splitlines()[-1]
