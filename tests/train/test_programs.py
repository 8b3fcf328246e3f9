"""Programs that a command runs: they end with it, whatever ends it."""

from __future__ import annotations

import signal
import sys

import pytest

from tests.ctrl_c import press_ctrl_c_when
from vlmamba.train.programs import run_program, running_program

SLOW = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (here / "got-sigterm").touch() or {end})
hidden = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
(here / "started").write_text(str(hidden))
time.sleep(60)
time.sleep(60)
"""


def test_a_program_runs_to_its_end():
    done = run_program([sys.executable, "-c", "print(1); exit(3)"], stdout=-1)
    assert (done.returncode, done.stdout) == (3, "1\n")


@pytest.mark.parametrize("end", ["sys.exit()", "None"], ids=["ends", "goes on"])
def test_ctrl_c_ends_the_program_by_sigterm_and_a_second_one_kills_it(end, tmp_path):
    names = ("started", "got-sigterm")[: 1 + (end == "None")]
    press_ctrl_c_when(*((tmp_path / name).exists for name in names))
    with pytest.raises(KeyboardInterrupt):
        with running_program([sys.executable, "-c", SLOW.format(end=end), str(tmp_path)]) as process:
            process.wait()
    assert (tmp_path / "got-sigterm").exists()
    assert (tmp_path / "started").read_text() == "True"  # hidden from the terminal's Ctrl-C
    assert process.returncode == (0 if end != "None" else -signal.SIGKILL)
