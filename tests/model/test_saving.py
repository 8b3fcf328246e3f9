"""Saving into a folder that is used: the old model or the new one at every moment, and nothing else is touched."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from vlmamba.model import MambaLM, Tokenizer, hub, weights
from vlmamba.model.config import LMConfig
from vlmamba.model.convert import convert
from vlmamba.model.files import PARTIAL
from vlmamba.model.hub import READY, replacing_folder


def language_model(seed, d_model=16):
    torch.manual_seed(seed)
    return MambaLM(LMConfig(d_model, 1, 280))


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def used(tmp_path):
    """A folder with a model in shards, its tokenizer, a card, a git repository and a file of somebody's."""
    folder = tmp_path / "model"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine too")
    model = language_model(0)
    model.tokenizer = Tokenizer.train(["some text"], vocab_size=270)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "MAX_SHARD_SIZE", 20_000)
        model.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def test_the_files_of_a_model_are_replaced_and_nothing_else(used):
    before = content(used)
    new = language_model(1, d_model=24)
    new.save_pretrained(used)
    after = content(used)
    kept = {"README.md", "notes.txt", ".git/HEAD"}
    assert {n: before[n] for n in kept} == {n: after[n] for n in kept}
    # Neither the shards of the old model nor its tokenizer are left to be mixed with the new one.
    assert set(after) == kept | {"config.json", "modeling_vlmamba.py", "model.safetensors"}
    assert same(MambaLM.from_pretrained(used), new)


def killed_at(moment, folder):
    """Save a new model, and die before the n-th change of a name in the folder."""
    left = moment

    def dying(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.replace, Path.unlink, Path.mkdir = dying(os.replace), dying(Path.unlink), dying(Path.mkdir)
    hub.shutil.rmtree = dying(hub.shutil.rmtree)
    language_model(1, d_model=24).save_pretrained(folder)


def test_killed_at_any_moment_the_old_model_is_there_or_the_new_one(used, tmp_path):
    old, new, seen = MambaLM.from_pretrained(used), language_model(1, d_model=24), []
    moment = 0
    while True:
        folder = tmp_path / f"copy-{moment}"
        hub.shutil.copytree(used, folder)
        process = multiprocessing.get_context("fork").Process(target=killed_at, args=(moment, folder))
        process.start()
        process.join()
        found = MambaLM.from_pretrained(folder)
        seen.append("new" if found.config == new.config else "old")
        assert same(found, new if seen[-1] == "new" else old)
        assert (found.tokenizer is None) == (seen[-1] == "new")
        assert not (folder / READY).exists()
        language_model(2).save_pretrained(folder)
        assert same(MambaLM.from_pretrained(folder), language_model(2))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        moment += 1
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}
    assert len(seen) > 10


def test_a_link_and_a_mount_point_are_saved_to(used, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("model")
    language_model(1).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and same(MambaLM.from_pretrained(used), language_model(1))
    replace = os.replace

    def busy(source, target):
        if used.resolve() in (Path(source).resolve(), Path(target).resolve()):
            raise OSError(errno.EBUSY, "Device or resource busy")  # as the system says of a mount point
        if used.resolve() not in Path(source).resolve().parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    language_model(2).save_pretrained(used)
    assert same(MambaLM.from_pretrained(used), language_model(2))


def test_an_unusable_output_folder_is_an_error_before_anything_is_written(used, tmp_path, monkeypatch):
    monkeypatch.setattr(MambaLM, "_save_pretrained", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("")
    for target in ("file", "file/model"):
        with pytest.raises(NotADirectoryError, match="must be a folder, but .*file is a file"):
            language_model(0).save_pretrained(tmp_path / target)
    (tmp_path / "other" / "config.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="has a folder in the place of the file config.json"):
        language_model(0).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="may not be written"):
        language_model(0).save_pretrained(used)


def test_an_error_within_leaves_the_folder_as_it_was(used):
    before = content(used)
    with pytest.raises(OSError, match="could not save .*model, which is as it was before: full"):
        with replacing_folder(used) as staged:
            (staged / "config.json").write_text("half")
            raise OSError(errno.ENOSPC, "full")
    assert content(used) == before


@pytest.mark.parametrize("name", ["../outside", "link/outside"])
def test_a_folder_from_elsewhere_cannot_write_outside_of_itself(used, tmp_path, name):
    (used / READY / "link").mkdir(parents=True)
    (used / READY / "link" / "outside").write_text("hostile")
    (used / READY / "replacement.json").write_text(json.dumps([name]))
    (tmp_path / "elsewhere").mkdir()
    (used / "link").symlink_to(tmp_path / "elsewhere")
    (used / "outside").write_text("hostile")
    with pytest.raises(ValueError, match="names a file outside of"):
        MambaLM.from_pretrained(used)
    assert not (tmp_path / "outside").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_no_litter_is_left(used):
    language_model(1).save_pretrained(used)
    assert not [p for p in used.rglob("*") if p.name.endswith(PARTIAL) or p.name == READY]


def test_a_killed_conversion_is_begun_anew_and_a_used_folder_is_refused(used, tmp_path):
    left = tmp_path / "converted" / f".abc{PARTIAL}"
    left.mkdir(parents=True)
    (left / "config.json").write_text("half")
    convert(used, tmp_path / "converted", "own")
    assert same(MambaLM.from_pretrained(tmp_path / "converted"), MambaLM.from_pretrained(used))
    assert not left.exists()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        convert(used, tmp_path / "converted", "own")
