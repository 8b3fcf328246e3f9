"""Figures: the reproducible apart from the speeds, both right, both continued after a resume; sample answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vlmamba.model.prompt import Turn
from vlmamba.train.records import Record
from vlmamba.train.track import SampleAnswers, Tracker, peak_memory, read_metrics

FIGURES = {"n_tokens": 100, "n_samples": 4, "loss": 2.5, "lr": 0.1, "grad_norm": 1.5, "wait": 0.5, "seconds": 2.0}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder, first_step, last_step, **options):
    tracker = Tracker(folder, "test", first_step, 9, **options)
    for step in range(first_step, last_step):
        tracker.step(step, **FIGURES)
    tracker.close()
    return tracker


def test_speeds_are_apart_from_what_is_reproducible(tmp_path):
    run(tmp_path, 0, 2, flops_per_token=3e9, peak_flops=1e12)
    assert read_metrics(tmp_path) == [{"step": s, "loss": 2.5, "lr": 0.1, "grad_norm": 1.5} for s in (0, 1)]
    speed = lines(tmp_path / "speeds.jsonl")[1]
    assert speed.pop("peak_memory") > 2**20
    assert speed == {
        "step": 1, "tokens_per_second": 50, "samples_per_second": 2, "data_wait": 0.25, "utilization": 0.15,
    }  # fmt: skip


def test_utilization_is_left_out_where_the_peak_is_not_known(tmp_path):
    run(tmp_path, 0, 1, flops_per_token=3e9)
    assert "utilization" not in lines(tmp_path / "speeds.jsonl")[0]


def test_after_a_resume_both_files_continue_at_the_checkpoint(tmp_path):
    run(tmp_path, 0, 5)
    for name in ("metrics.jsonl", "speeds.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 5, "lo')  # cut by a crash
    run(tmp_path, 3, 9)
    for name in ("metrics.jsonl", "speeds.jsonl"):
        assert [m["step"] for m in lines(tmp_path / name)] == list(range(9))


def test_tensorboard_has_every_figure(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, 0, 3)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == [2.5] * 3
    assert events.Scalars("speed/tokens_per_second")[0].value == 50


def test_wandb_logs_the_metrics_on_request(tmp_path, monkeypatch):
    logged, started = [], []

    def init(**options):
        started.append(options)
        return SimpleNamespace(log=lambda f, step: logged.append((step, f)), finish=lambda: logged.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=importlib.util.find_spec("json")))
    run(tmp_path, 0, 1)
    assert not started
    for _ in range(2):
        run(tmp_path / "run" / "align", 0, 1, wandb="project")
    assert started[0]["project"] == "project" and started[0]["name"] == "run/test"
    assert started[0]["id"] == started[1]["id"]  # a resume goes on in the same run
    assert logged[0][0] == 0 and logged[0][1]["loss"] == 2.5 and logged[0][1]["speed/samples_per_second"] == 2
    assert logged[1] == "end"


def test_wandb_that_is_not_installed_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        Tracker(tmp_path / "new", "test", 0, 9, wandb="project")
    assert not (tmp_path / "new").exists()


def test_peak_memory_is_in_bytes():
    before = peak_memory()
    block = torch.ones(before // 4)  # as much again
    assert peak_memory() > 1.5 * before
    del block


class Parrot(nn.Module):
    def generate(self, conversations, images, config):
        assert not self.training
        return [f"{c[0].text}!" for c in conversations]


def test_sample_answers_come_every_so_many_steps_and_again_after_a_resume(tmp_path):
    records = [
        Record((Turn("user", q), Turn("assistant", "yes"), Turn("user", "?"), Turn("assistant", "no"))) for q in "ab"
    ]
    ask, model = SampleAnswers(tmp_path, records, every=3), Parrot().train()
    for step in [*range(7), *range(4, 10)]:  # a resume from step 4
        ask(step, model)
    assert model.training
    told = lines(tmp_path / "answers.jsonl")
    assert [(t["step"], t["question"], t["answer"]) for t in told] == [(s, q, f"{q}!") for s in (2, 5, 8) for q in "ab"]
    assert {t["truth"] for t in told} == {"yes"}
    with pytest.raises(ValueError, match="every must be at least 1"):
        SampleAnswers(tmp_path, records, every=0)


def test_a_resume_rewrites_no_answer_and_reports_a_damaged_line(tmp_path, caplog):
    run(tmp_path, 0, 5)
    path = tmp_path / "metrics.jsonl"
    damaged = path.read_bytes().replace(b'{"step": 1', b'{"step\x00 1')
    path.write_bytes(damaged)
    inode = path.stat().st_ino
    tracker = Tracker(tmp_path, "test", 3, 9)
    assert path.stat().st_ino == inode
    assert path.read_bytes() == b"".join(damaged.splitlines(keepends=True)[:3])  # as a kill here would leave it
    tracker.close()
    assert f"{path}, line 2 is damaged" in caplog.text
    assert [m["step"] for m in read_metrics(tmp_path)] == [0, 2]
