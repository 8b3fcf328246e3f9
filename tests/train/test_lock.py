"""One run at a time in a folder: a second process is told who is there; nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import time

import pytest

from vlmamba.train.lock import LOCK, only_run_in

FORK = multiprocessing.get_context("fork")


def hold(folder, held):
    with only_run_in(folder):
        held.set()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """A process that is in the folder."""
    held = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_run_names_the_first_and_a_kill_leaves_no_lock(tmp_path, holder):
    told = f"{tmp_path} is in use by another run .process {holder.pid} on {socket.gethostname()}, since 20"
    with pytest.raises(BlockingIOError, match=told), only_run_in(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    for _ in range(2):
        with only_run_in(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()


def test_two_runs_of_one_process_do_not_mix_either(tmp_path):
    with only_run_in(tmp_path), pytest.raises(BlockingIOError), only_run_in(tmp_path):
        pass


def hold_with_a_worker(folder, pids):
    with only_run_in(folder):
        worker = FORK.Process(target=time.sleep, args=(600,))
        worker.start()
        pids.put(worker.pid)
        time.sleep(600)


def test_a_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path):
    pids = FORK.Queue()
    process = FORK.Process(target=hold_with_a_worker, args=(tmp_path, pids))
    process.start()
    worker = pids.get(timeout=60)
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        os.kill(worker, 0)  # it is still there
        with only_run_in(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_reported_once(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_run_in(tmp_path):
        pass
    assert caplog.text.count("this file system has no locks") == 1
