"""The papers' tables: rows that exist, plans, runs that resume row by row, figures, and the same in miniature."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vlmamba import cli
from vlmamba.commands import COMMANDS
from vlmamba.model import PRESETS
from vlmamba.train import easy_vqa
from vlmamba.train.recipes import QUICK, RECIPES, DemoRecipe
from vlmamba.train.reproduction import full
from vlmamba.train.reproduction.intervals import as_text, compare
from vlmamba.train.reproduction.miniature import run_miniature
from vlmamba.train.reproduction.tables import BENCHMARKS, TABLES, table_named


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_presets_that_differ_as_their_miniatures_do(name):
    table = TABLES[name]
    assert table.recipe in RECIPES and set(table.benchmarks) <= set(BENCHMARKS)
    presets = [row.preset for row in table.rows.values() if row.preset is not None]
    assert set(presets) <= set(PRESETS) and len(set(presets)) == len(presets)
    miniatures = [row.miniature for row in table.rows.values()]
    assert len({str(m) for m in miniatures}) == len(miniatures)
    for row in table.rows.values():
        assert set(row.figures) <= set(table.benchmarks)
        if row.preset is None:
            continue
        config, tiny = PRESETS[row.preset].config, row.miniature
        assert config.language.layer == tiny.layer
        assert (config.connector.kind, config.connector.scan) == (tiny.connector.kind, tiny.connector.scan)
        assert config.connector.vss == tiny.connector.vss and tiny.family == name[:8]
        assert len(config.vision) == len(tiny.encoders) or name != "ml-mamba-encoder"


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ValueError, match="no table 'vl-mamba-scans'; did you mean 'vl-mamba-scan'"):
        table_named("vl-mamba-scans")
    with pytest.raises(ValueError, match="no row 'VSS'; .*VSS-L2|no row 'VSS'; did you mean 'VSS-MLP'"):
        TABLES["vl-mamba-connector"].selected(["VSS"])


def test_the_plan_names_data_memory_and_hours(capsys):
    cli.main(["reproduce", "ml-mamba-language", "--dry-run", "--devices", "8"])
    shown = capsys.readouterr().out
    assert "665,298 records" in shown and "hours on 8 A100" in shown
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.startswith("Mamba2-")}
    assert list(rows) == ["Mamba2-780M", "Mamba2-1.3B", "Mamba2-2.7B"]
    assert float(rows["Mamba2-2.7B"][-2]) > float(rows["Mamba2-1.3B"][-2]) > float(rows["Mamba2-780M"][-2]) > 0
    # H100 is as much faster as its peak is higher.
    assert float(rows["Mamba2-2.7B"][-2]) / float(rows["Mamba2-2.7B"][-1]) == pytest.approx(989.5 / 312, rel=0.1)


def test_rows_in_miniature_only_say_so(here):
    for more in (["--dry-run"], []):
        with pytest.raises(SystemExit, match="row 'Mamba-2' has no model at full size: add --miniature"):
            cli.main(["reproduce", "ml-mamba-layer", *more])


class Commands:
    """Stands for the three programs: keeps the command lines, and writes what they would."""

    def __init__(self, failing: str = ""):
        self.lines: list[list[str]] = []
        self.failing = failing

    def run(self, command: list[str]) -> SimpleNamespace:
        self.lines.append(command)
        if self.failing and self.failing in " ".join(command):
            return SimpleNamespace(returncode=3)
        value = dict(zip(command, command[1:], strict=False))
        if "train" in command:
            (Path(value["--output"]) / "model").mkdir(parents=True)
            (Path(value["--output"]) / "model" / "config.json").write_text("{}")
        elif "evaluate" in command:
            Path(value["--output"]).parent.mkdir(parents=True, exist_ok=True)
            Path(value["--output"]).write_text(json.dumps({"figures": {"accuracy": 0.25}, "answers": []}))
        else:
            metrics = {b.task: {f"{b.metric},none": 0.5} for b in BENCHMARKS.values()}
            results = {task: metrics[task] for task in value["--tasks"].split(",")}
            out = Path(value["--output_path"]) / "model"
            out.mkdir(parents=True, exist_ok=True)
            (out / f"2026-01-0{len(self.lines)}_results.json").write_text(json.dumps({"results": results}))
        return SimpleNamespace(returncode=0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_each_row_is_trained_and_evaluated_once(here, monkeypatch, capsys):
    commands = Commands()
    monkeypatch.setattr(full, "run_program", commands.run)
    call = ["reproduce", "ml-mamba-scan", "--launcher", "torchrun --nproc-per-node 8", "--output", "out"]
    cli.main(call)
    trained, evaluated = commands.lines[::2], commands.lines[1::2]
    assert [line[:5] for line in trained] == [["torchrun", "--nproc-per-node", "8", "-m", "vlmamba"]] * 2
    # The real command line takes what is run.
    ran = []
    monkeypatch.setattr(COMMANDS["train"], "run", lambda self: ran.append((self.model, self.stage, self.recipe)))
    for line in trained:
        cli.main(line[5:])
    assert ran == [("ml-mamba-3b", "both", "ml-mamba"), ("ml-mamba-3b-cross", "both", "ml-mamba")]
    assert "pretrained=out/ml-mamba-3b/model,dtype=bfloat16" in evaluated[0]
    assert "vqav2_val,gqa,textvqa_val,pope,vizwiz_vqa_val" in evaluated[0]
    shown = capsys.readouterr().out
    assert "50.0 (75.26, -25.3)" in shown and "(51.5)" in shown
    assert json.loads(Path("out/results.json").read_text())["Cross (CSM)"]["GQA"] == 50.0
    cli.main(call)
    assert len(commands.lines) == 4


def test_a_benchmark_that_the_harness_has_not_is_evaluated_by_our_own_command(here, monkeypatch, capsys):
    commands = Commands()
    monkeypatch.setattr(full, "run_program", commands.run)
    call = ["reproduce", "ml-mamba", "--output", "out", "--root", "data"]
    cli.main(call)
    assert "left out, since there is no data/vsr/test.jsonl: VSR" in capsys.readouterr().out.replace(
        "images", "test.jsonl"
    )
    Path("data/vsr/images").mkdir(parents=True)
    Path("data/vsr/test.jsonl").write_text("")
    cli.main(call)
    assert "25.0 (51.5, -26.5)" in capsys.readouterr().out
    # One more command, which the real command line takes.
    assert len(commands.lines) == 3
    ran = []
    monkeypatch.setattr(COMMANDS["evaluate"], "run", lambda self: ran.append((self.benchmark, str(self.data))))
    cli.main(commands.lines[-1][3:])
    assert ran == [("vsr", "data/vsr/test.jsonl")]
    cli.main(call)
    assert len(commands.lines) == 3


def test_a_failure_names_row_and_command_and_the_rest_stays(here, monkeypatch):
    commands = Commands(failing="ml-mamba-3b-cross")
    monkeypatch.setattr(full, "run_program", commands.run)
    call = ["reproduce", "ml-mamba-scan", "--output", "out"]
    with pytest.raises(SystemExit, match=r"Cross \(CSM\): exit status 3 of: .*train ml-mamba-3b-cross"):
        cli.main(call)
    commands.failing = ""
    cli.main(call)
    assert sum("ml-mamba-3b" in line for line in commands.lines) == 1


def test_judged_benchmarks_need_a_key(here, monkeypatch, capsys):
    commands = Commands()
    monkeypatch.setattr(full, "run_program", commands.run)
    cli.main(["reproduce", "vl-mamba", "--output", "out"])
    assert "OPENAI_API_KEY is not set: MMB, MM-Vet" in capsys.readouterr().out
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    cli.main(["reproduce", "vl-mamba", "--output", "out"])
    assert commands.lines[-1][commands.lines[-1].index("--tasks") + 1] == "mmbench_en_dev,mmvet"


def test_an_order_is_claimed_only_where_it_holds():
    rng = np.random.default_rng(0)

    def answers(rates):
        return np.stack([rng.random(2000) < rate for rate in rates])

    close = {"a": answers([0.90, 0.80, 0.95, 0.85]), "b": answers([0.92, 0.86, 0.84, 0.91])}
    found = compare(close)
    ((pair, interval),) = found.pairs.items()
    assert interval.low < 0 < interval.high and not found.is_claimed(pair)
    assert "are not told apart" in as_text(found)
    apart = compare(close | {"c": answers([0.70, 0.71, 0.69, 0.70])})
    assert apart.is_claimed(("a", "c")) and apart.is_claimed(("b", "c")) and "is better than c" in as_text(apart)
    # Seeds that agree leave the questions' part, the binomial's 1.96 sqrt(p (1 - p) / n).
    one = compare({"c": np.repeat(answers([0.7]), 4, axis=0)}).rows["c"]
    assert one.high - one.low == pytest.approx(2 * 1.96 * (0.21 / 2000) ** 0.5, rel=0.1)
    with pytest.raises(ValueError, match="the same questions"):
        compare({"a": np.ones((1, 3), bool), "b": np.ones((1, 4), bool)})


TINY = DemoRecipe(
    *(
        replace(s, batch_size=8, epochs=2 * 8 / n, save_every=2)
        for s, n in ((QUICK.vision, 30), (QUICK.language, 330), (QUICK.align, 30), (QUICK.finetune, 300))
    )
)


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        pytest.param("ml-mamba-encoder", 1),
        pytest.param("vl-mamba-language", 2, marks=pytest.mark.nightly),
    ],
)
def test_the_miniature_runs_every_row_and_seed_and_resumes(name, processes, tmp_path, monkeypatch, capsys):
    real = easy_vqa.load
    monkeypatch.setattr(easy_vqa, "load", lambda split: real(split)[: 300 if split == "train" else 40])
    table = TABLES[name]
    rows = dict(list(table.rows.items())[:2])
    first = run_miniature(table, rows, TINY, tmp_path, range(2), 30, processes)
    assert list(first.rows) == list(rows)
    answers = sorted(tmp_path.glob("row-*/seed-*/answers.json"))
    assert len(answers) == 4 and all(len(json.loads(a.read_text())) == 30 for a in answers)
    assert (tmp_path / "intervals.png").read_bytes().startswith(b"\x89PNG")
    stamps = [a.stat().st_mtime_ns for a in answers]
    answers[0].unlink()
    assert run_miniature(table, rows, TINY, tmp_path, range(2), 30, processes) == first
    assert [a.stat().st_mtime_ns for a in answers[1:]] == stamps[1:]
    assert "in miniature" in capsys.readouterr().out
