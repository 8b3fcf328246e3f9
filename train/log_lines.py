"""Logging to stderr, in lines above the progress bars."""

from __future__ import annotations

import logging
import sys

from ..model.extras import NOISY_LOGGERS


def show_warnings() -> None:
    """Show what the library logs from warnings on, for example that a slower backend runs."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[LinesOfTheirOwn()])
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


class LinesOfTheirOwn(logging.StreamHandler):
    """Log to stderr, where a record is a line above the progress bars, not the end of one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        # Without importing tqdm: what did not import it draws no bar.
        bars = sys.modules.get("tqdm")
        if bars is None:
            super().emit(record)
        else:
            bars.tqdm.write(self.format(record), file=self.stream)
