"""Jobs side by side: their output is labelled, and errors and signals reach all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import resource_tracker, spawn
from pathlib import Path

import pytest

from tests.ctrl_c import a_process_starts, press_ctrl_c_when
from vlmamba.train.errors import Interrupted
from vlmamba.train.side_by_side import Job, _Display, run_side_by_side

# Without torch, so that a job starts in a moment.
JOBS = """
import os, signal, sys, time
from pathlib import Path

class Stopped(SystemExit):
    pass

def says(folder, text):
    print(text, flush=True)
    (folder / text).touch()

def hides():
    print("SIGINT is", "hidden" if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []) else "seen")

def warns():
    import logging
    from tqdm import tqdm
    with tqdm(total=2) as bar:
        bar.update()
        logging.getLogger("ssm_kernels").warning("slow")

def fails(folder):
    wait_for(folder / "stops")
    raise OSError(28, "no space left")

def dies(folder):
    wait_for(folder / "stops")
    os.kill(os.getpid(), signal.SIGKILL)

def stops(folder):
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    (folder / "stops").touch()
    while not stopped:
        time.sleep(0.01)
    (folder / "saved").touch()
    raise Stopped(143)

def wait_for(path):
    while not path.exists():
        time.sleep(0.01)
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """A module of jobs that a process can import."""
    (tmp_path / "side_by_side_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    import side_by_side_jobs  # pyright: ignore[reportMissingImports]

    yield side_by_side_jobs
    del sys.modules["side_by_side_jobs"]


def test_every_job_runs_and_its_lines_have_its_name(jobs, tmp_path, capfd):
    run_side_by_side([Job("one", jobs.says, (tmp_path, "first")), Job("other", jobs.says, (tmp_path, "second"))])
    assert (tmp_path / "first").exists() and (tmp_path / "second").exists()
    shown = capfd.readouterr().err
    assert "one   | first\n" in shown and "other | second\n" in shown


def test_a_job_does_not_see_the_terminal_s_ctrl_c(jobs, capfd):
    """It gets a SIGTERM in its place, and prints no traceback where Ctrl-C comes while it imports modules."""
    run_side_by_side([Job("one", jobs.hides)])
    assert "SIGINT is hidden" in capfd.readouterr().err


def test_a_signal_ends_jobs_while_they_start(jobs, tmp_path):
    """A job's arguments may be more than a pipe holds, and its modules take long to import."""
    (tmp_path / "slow_to_import.py").write_text(
        "import multiprocessing, time\nif multiprocessing.parent_process():\n    time.sleep(30)\ndef run(*args): ..."
    )
    import slow_to_import  # pyright: ignore[reportMissingImports]

    press_ctrl_c_when(a_process_starts())
    start = time.monotonic()
    with pytest.raises(Interrupted):
        run_side_by_side([Job(name, slow_to_import.run, ("x" * 1_000_000,)) for name in ("one", "other")])
    assert time.monotonic() - start < 29


def test_a_process_that_ends_before_its_job_is_read_is_an_error(jobs, tmp_path):
    resource_tracker.ensure_running()  # by the real program
    spawn.set_executable("/bin/false")
    try:
        with pytest.raises(ChildProcessError, match="the process of one ended with status 1"):
            run_side_by_side([Job("one", jobs.says, (tmp_path, "x" * 1_000_000))])
    finally:
        spawn.set_executable(sys.executable)


def test_a_warning_is_a_line_with_the_job_s_name(jobs, capfd):
    run_side_by_side([Job("one", jobs.warns)])
    assert "one | WARNING: slow\n" in capfd.readouterr().err


def test_the_error_of_one_ends_the_others_and_is_raised(jobs, tmp_path):
    with pytest.raises(OSError, match="no space left") as caught:
        run_side_by_side([Job("stops", jobs.stops, (tmp_path,)), Job("fails", jobs.fails, (tmp_path,))])
    assert (tmp_path / "saved").exists()
    assert "in the process of fails" in str(caught.value.__cause__)


def test_a_process_that_dies_ends_the_others(jobs, tmp_path):
    with pytest.raises(ChildProcessError, match="dies ended by SIGKILL"):
        run_side_by_side([Job("stops", jobs.stops, (tmp_path,)), Job("dies", jobs.dies, (tmp_path,))])
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_parent_reaches_every_job(jobs, tmp_path, number):
    """Also SIGKILL, of which the parent cannot tell anybody: its jobs notice, save and end."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    script = f"""
        import sys
        from pathlib import Path
        from vlmamba.train.side_by_side import Job, run_side_by_side
        sys.path.insert(0, {str(tmp_path)!r})
        from side_by_side_jobs import stops
        if __name__ == "__main__":
            run_side_by_side([Job(n, stops, (Path({str(tmp_path)!r}) / n,)) for n in "ab"])
    """
    (tmp_path / "parent.py").write_text(textwrap.dedent(script))
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], env=os.environ | {"PYTHONPATH": root})
    _wait_for(tmp_path / "a" / "stops", tmp_path / "b" / "stops")
    parent.send_signal(number)
    assert parent.wait(60) == (-9 if number == signal.SIGKILL else 128 + number)
    _wait_for(tmp_path / "a" / "saved", tmp_path / "b" / "saved")


def test_a_terminal_shows_the_newest_state_of_each_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with _Display(["vision", "ml"]) as display:
        display.show("vision", b"\r  1/9\r  2/9")
        display.show("vision", b"\r  3/9")
        assert display.bars["vision"].desc == "vision | 3/9"
        display.show("ml", b"started\n\r 1/2\r      \rsaved\n\r 1/2")
        assert display.bars["ml"].desc == "ml     | 1/2"
    shown = capsys.readouterr().err
    assert "ml     | started\n" in shown and "ml     | saved\n" in shown


def _wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)
