"""Warnings of a command are lines above its progress bars."""

from __future__ import annotations

import io
import logging
import re

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
