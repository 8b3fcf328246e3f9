"""Warnings of a command are lines above its progress bars."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys

import pytest
from tqdm import tqdm

from vlmamba.train.log_lines import LinesOfTheirOwn


def test_a_warning_is_a_line_of_its_own_beside_a_progress_bar():
    stream = io.StringIO()
    logger = logging.Logger("test")
    logger.addHandler(handler := LinesOfTheirOwn(stream))
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    with tqdm(total=3, file=stream) as bar:
        bar.update()
        logger.warning("slow")
    lines = re.split("[\r\n]", stream.getvalue())
    assert "WARNING: slow" in lines and any("1/3" in line or "0/3" in line for line in lines)


IN_THIS_PROCESS = """
from vlmamba.train.log_lines import show_warnings
show_warnings()
import torchao.quantization
"""
IN_ONE_THAT_MEASURES_MEMORY = """
from vlmamba.benchmarks.memory import in_fresh_process
print(in_fresh_process(abs, -3))
"""


@pytest.mark.parametrize("script", [IN_THIS_PROCESS, IN_ONE_THAT_MEASURES_MEMORY], ids=["command", "memory"])
def test_importing_torchao_says_nothing(script, tmp_path):
    """transformers imports it too."""
    pytest.importorskip("torchao")
    pytest.importorskip("transformers")
    path = tmp_path / "script.py"  # a file, which the process that is forked can import
    path.write_text('if __name__ == "__main__":\n' + "".join(f"    {line}\n" for line in script.strip().splitlines()))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
