"""Files that a crash leaves whole: kills at every write, lines that are damaged, links that stay links."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import sys

import pytest

from vlmamba.model import files
from vlmamba.model.files import PARTIAL, continue_json_lines, json_lines, remove_partials, write_atomic, writing_atomic


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_as_a_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "one")
    path.chmod(0o640)
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(RuntimeError), writing_atomic(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == b"two" and names(tmp_path) == ["file"]


def test_a_link_stays_one_and_its_target_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for text in ("one", "two"):
        write_atomic(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "two"


def die_before_the_rename(path):
    files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    write_atomic(path, "new")


def test_a_kill_before_the_rename_leaves_the_old_file_and_a_partial_that_is_removed(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    process = multiprocessing.get_context("fork").Process(target=die_before_the_rename, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert [n.endswith(PARTIAL) for n in names(tmp_path)] == [True, False]
    (tmp_path / f".folder{PARTIAL}" / "inner").mkdir(parents=True)
    (tmp_path / ".hidden").write_text("somebody's own")
    remove_partials(tmp_path)
    assert names(tmp_path) == [".hidden", "file"]


def lines(*steps):
    return "".join(json.dumps({"step": s}) + "\n" for s in steps)


def test_lines_are_truncated_and_continued_in_place(tmp_path):
    path = tmp_path / "lines.jsonl"
    with continue_json_lines(path, lambda line: line["step"] < 0) as file:
        file.write(lines(*range(5)))
    inode = path.stat().st_ino
    with open(path, "ab") as file:
        file.write(b'{"step": 5, "te\xff')  # cut by a crash
    with continue_json_lines(path, lambda line: line["step"] < 3) as file:
        # At no moment, this one included, is there less than what is kept.
        assert path.read_text() == lines(0, 1, 2)
        file.write('{"step": 3, "text": "\u2028\x85"}\n')
    assert path.stat().st_ino == inode
    assert [(line.number, line.value["step"]) for line in json_lines(path)] == [(1, 0), (2, 1), (3, 2), (4, 3)]


def continue_and_watch(path):
    """Exit with the number of times that the file was emptied."""
    emptied = []

    def watch(event, details):
        if event == "open" and str(details[0]) == str(path) and details[2] & os.O_TRUNC:
            emptied.append(details)

    sys.addaudithook(watch)
    continue_json_lines(path, lambda line: line["step"] < 3).close()
    os._exit(len(emptied))


def test_at_no_moment_is_a_file_that_grows_empty(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(lines(*range(5)))
    process = multiprocessing.get_context("fork").Process(target=continue_and_watch, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert path.read_text() == lines(0, 1, 2)


def test_nothing_is_truncated_where_everything_fits(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    path.write_text(lines(0, 1))
    monkeypatch.setattr(files.os, "truncate", lambda *_: pytest.fail("truncated"))
    continue_json_lines(path, lambda line: line["step"] < 2).close()
    assert path.read_text() == lines(0, 1)


@pytest.mark.parametrize("damage", [b'{"step": 1', b"\x00\x00", b"[1]", b"\xff\xfe", b"[" * 100_000, b""])
def test_a_damaged_line_is_named_and_blocks_nothing(tmp_path, caplog, damage):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(lines(0).encode() + damage + b"\n" + lines(2, 3).encode())
    continue_json_lines(path, lambda line: line["step"] < 3).close()
    assert f"{path}, line 2 is damaged" in caplog.text
    assert [line.value for line in json_lines(path)] == [{"step": 0}, None, {"step": 2}]
