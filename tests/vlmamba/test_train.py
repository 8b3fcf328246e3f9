"""`vlmamba train`: recipes and what the command changes of them, plans, whole runs with their card, clear errors."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard

from tests.makers import save_images
from tests.train.makers import qa_record, tiny_vlm
from vlmamba import cli
from vlmamba.commands import train_stages
from vlmamba.commands.train import RECIPE_DEFAULTS, SHOWN, DataOptions, OptimizationOptions, Train
from vlmamba.model import VLM, MambaLM, Tokenizer
from vlmamba.model.card import CardFacts
from vlmamba.model.config import LMConfig
from vlmamba.train import loop
from vlmamba.train.config import StageConfig
from vlmamba.train.lock import only_run_in
from vlmamba.train.recipes import RECIPES, recipe_named, tiny_config
from vlmamba.train.records import write_llava
from vlmamba.train.track import read_metrics

COLORS = ("red", "blue", "green", "black")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def data(tmp_path):
    """24 questions in data/train.json about the images in data/images."""
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    save_images(images, COLORS, (60, 50))
    records = [qa_record("what color is it", f"it is {c}", images / f"{c}.png") for c in COLORS * 6]
    write_llava(records, tmp_path / "data" / "train.json", images)
    return tmp_path / "data"


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["what color is it", *(f"it is {c}" for c in COLORS)], vocab_size=290)
    tiny_vlm("vl-mamba", tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def train(*arguments):
    cli.main(["train", *map(str, arguments), "--output", "run", "--device", "cpu"])


def fails(*arguments) -> str:
    with pytest.raises(SystemExit) as end:
        train(*arguments)
    return str(end.value)


def test_both_stages_train_what_they_should_and_leave_a_card(model, data):
    arguments = (
        model, data / "train.json", "--images", data / "images", "--stage", "both", "--epochs", "2",
        "--batch-size", "8", "--micro-batch-size", "3", "--lr", "0.01", "--sample-every", "3", "--samples", "2",
        "--peak-tflops", "0.1",
    )  # fmt: skip
    train(*arguments)
    start, end = VLM.from_pretrained(model), VLM.from_pretrained("run/model")
    changed = {n for n, p in end.state_dict().items() if not torch.equal(p, start.state_dict()[n])}
    assert {n.split(".")[0] for n in changed} == {"connector", "language_model"}
    for stage in ("align", "finetune"):
        assert len(read_metrics(data.parent / "run" / stage)) == 6
        assert len((data.parent / "run" / stage / "answers.jsonl").read_text().splitlines()) == 4
        assert '"utilization"' in (data.parent / "run" / stage / "speeds.jsonl").read_text()

    card = (data.parent / "run" / "model" / "README.md").read_text()
    data_of_card = ModelCard(card).data
    assert data_of_card.library_name == "vl-mamba" and data_of_card.pipeline_tag == "image-text-to-text"
    assert data_of_card.base_model is None and str(model) not in card  # a folder means nothing elsewhere
    annotations = (data / "train.json").read_bytes()
    assert f"| train.json | {len(annotations):,} | `{hashlib.sha256(annotations).hexdigest()}` |" in card
    assert "| records | 24 |" in card
    assert "recipe `small`" in card and "### Stage align" in card and "| lr | 0.01 |" in card
    last = read_metrics(data.parent / "run" / "finetune")
    assert f"| loss, mean of the last 6 steps | {sum(m['loss'] for m in last) / 6:.4f} |" in card
    assert f"| torch | {importlib.metadata.version('torch')} |" in card

    before = end.state_dict()
    train(*arguments)  # finished: restored, and trained no further
    assert all(torch.equal(p, before[n]) for n, p in VLM.from_pretrained("run/model").state_dict().items())
    assert len(read_metrics(data.parent / "run" / "align")) == 6


def test_the_end_says_how_to_talk_to_the_model(model, data, capsys):
    train(model, data / "train.json", "--images", data / "images", "--epochs", "0.1", "--sample-every", "1")
    said = capsys.readouterr()
    command = said.out.partition("saved run/model. Chat with it:\n")[2].split()
    assert command == ["vlmamba", "chat", "run/model", "--image", str(data / "images" / "red.png")]
    assert re.search(r"step 1: 'what color is it' → '.*', truth 'it is red'", said.err)


def test_lora_is_merged_into_the_model_that_is_saved(model, data):
    train(model, data / "train.json", "--images", data / "images", "--epochs", "2", "--batch-size", "8",
          "--lora.rank", "2", "--lora.targets", "in_proj", "dt_proj")  # fmt: skip
    start, end = VLM.from_pretrained(model).state_dict(), VLM.from_pretrained("run/model").state_dict()
    assert list(start) == list(end)
    changed = {n for n in start if n.startswith("language_model") and not torch.equal(start[n], end[n])}
    assert {n.split(".")[-2] for n in changed} == {"in_proj", "dt_proj"}
    assert (
        "rank 2, alpha 4.0, dropout 0.0, targets in_proj dt_proj" in (data.parent / "run/model/README.md").read_text()
    )


def test_a_dry_run_reports_and_writes_nothing(model, data, capsys):
    train(model, data / "train.json", "--images", data / "images", "--batch-size", "8", "--dry-run")
    out = capsys.readouterr().out
    for part in (
        "recipe small", "vision", "frozen", "connector", "trainable", "memory per device", "3 (1 epoch of 24 samples)",
        "measured on 24 of 24 samples", "data and checkpoints are in order",
    ):  # fmt: skip
        assert part in out, part
    assert not (data.parent / "run").exists()


def test_a_dry_run_of_a_paper_needs_neither_weights_nor_a_network(data, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    train("vl-mamba", data / "train.json", "--images", data / "images", "--stage", "both", "--dry-run")
    out = capsys.readouterr().out
    assert "model vl-mamba-2.8b, recipe vl-mamba" in out
    assert "2,768,345,600 frozen" in out and "2,768,345,600 trainable" in out
    assert "are not all here; training downloads them" in out
    assert "a token is estimated as four characters" in out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert "but the disk has" in fails("vl-mamba", data / "train.json", "--images", data / "images", "--dry-run")


def test_a_dry_run_finds_what_would_stop_a_run(model, data, monkeypatch):
    arguments = (model, data / "train.json", "--images", data / "images", "--dry-run")
    (data / "images" / "red.png").write_bytes(b"no image")
    assert "red.png" in fails(*arguments)
    save_images(data / "images", ["red"], (60, 50))
    config = json.loads((model / "config.json").read_text())
    config["language"]["d_model"] = 72
    (model / "config.json").write_text(json.dumps(config))
    assert "backbone.embedding.weight" in fails(*arguments)


def test_every_setting_of_a_stage_can_be_changed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    for field in dataclasses.fields(StageConfig):
        option = rf"--{field.name.replace('_', '-')}[ ,]"
        assert bool(re.search(option, shown)) == (field.name not in ("name", "lora"))
    assert "Peak learning rate. (default: vl-mamba 2e-05, ml-mamba 2e-05, small 0.001)" in shown
    command = Train(
        "x", "run", recipe="ml-mamba", stage="both", trainable=("connector.",), loading=DataOptions(workers=2),
        optimization=OptimizationOptions(lr=0.5, betas=(0.8, 0.9)),
    )  # fmt: skip
    for stage in train_stages._stages(command, recipe_named("ml-mamba")):
        assert (stage.lr, stage.betas, stage.trainable, stage.workers) == (0.5, (0.8, 0.9), ("connector.",), 2)
        assert stage.precision == "bf16"  # the recipe's


def test_the_recipes_own_data_are_found_or_their_source_is_named(tmp_path, monkeypatch):
    assert "no data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json" in fails("vl-mamba", "--stage", "align")
    assert "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain" in fails("vl-mamba", "--stage", "align")
    folder = tmp_path / "elsewhere" / "LLaVA-Pretrain"
    folder.mkdir(parents=True)
    (folder / "blip_laion_cc_sbu_558k.json").write_text("[]")
    (folder / "images.zip").write_bytes(b"")
    command = Train("vl-mamba", "run", loading=DataOptions(root=tmp_path / "elsewhere"))
    files = train_stages._files(command, recipe_named("vl-mamba"), "align")
    assert files == ((folder / "blip_laion_cc_sbu_558k.json", folder / "images.zip"),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("vl-mamba-2.8", "data/train.json"),
            "no folder, preset or recipe 'vl-mamba-2.8'; did you mean 'vl-mamba-2.8b'",
        ),
        (("vl_mamba", "data/train.json"), "did you mean 'vl-mamba'"),
        (("model", "data/train.json", "--recipe", "ml-mmba"), "no recipe 'ml-mmba'; did you mean 'ml-mamba'"),
        (("model",), "name DATA"),
        (("model", "nowhere.json"), "no annotations at nowhere.json"),
        (("run/model", "data/train.json"), "would replace the model that training starts from"),
        (("model", "data/train.json", "--images", "a", "b"), "--images must be one for all data or one for each of 1"),
        (("model", "data/train.json", "--lora.alpha", "3"), "--lora.alpha needs --lora.rank"),
        (("model", "data/train.json", "--lora.rank", "0"), "rank of LoRA must be in [1, 1048576], got 0"),
        (("model", "data/train.json", "--lora.rank", "2", "--stage", "align"), "--lora is for the finetune stage"),
        (("model", "data/train.json", "--lr", "-1"), "--lr must be in (0, 1000000], got -1.0"),
        (("model", "data/train.json", "--samples", "0"), "--samples must be at least 1, got 0"),
        (("language", "data/train.json"), "language is not a vision-language model"),
    ],
)
def test_an_error_of_the_options_is_one_line(arguments, message, model, data, tmp_path):
    if arguments[0] == "language":
        MambaLM(LMConfig(32, 1, 100)).save_pretrained(tmp_path / "language")
    assert message in fails(*arguments)
    assert not (tmp_path / "run").exists()


def test_a_folder_comes_before_a_recipe_of_its_name(model, data, capsys):
    model.rename("vl-mamba")
    train("vl-mamba", data / "train.json", "--images", data / "images", "--dry-run")
    assert "model vl-mamba, recipe small" in capsys.readouterr().out


def test_an_unknown_flag_gets_a_suggestion(model, data, capsys):
    with pytest.raises(SystemExit):
        train(model, data / "train.json", "--batchsize", "3")
    assert "--batch-size" in capsys.readouterr().err


def test_a_template_of_captions_is_for_the_align_stage_alone(model, data, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train_stages, "train_stage", lambda m, stage, samples, *rest: seen.append((stage.name, samples[0]))
    )
    monkeypatch.setattr(train_stages, "card_facts", lambda *a: CardFacts())
    train(model, data / "train.json", "--images", data / "images", "--recipe", "ml-mamba", "--stage", "both")
    (_, align), (_, finetune) = seen
    tokenizer = VLM.from_pretrained(model).tokenizer
    assert tokenizer.decode([t for t in align.input_ids if t >= 0]).startswith("it is red")
    assert tokenizer.decode([t for t in finetune.input_ids if t >= 0]).startswith("what color is it")


def test_only_the_first_rank_prints(monkeypatch, capsys):
    monkeypatch.setattr(train_stages, "rank", lambda: 1)
    train_stages.print_once("hello")
    assert capsys.readouterr().out == ""
    assert loop.rank() == 0


def test_a_used_output_is_resumed_by_the_same_command_alone(model, data, tmp_path, capsys):
    arguments = (model, data / "train.json", "--images", data / "images", "--batch-size", "8")
    train(*arguments)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    os.utime(data / "train.json", (1, 1))
    capsys.readouterr()
    train(*arguments, "--save-every", "3", "--workers", "1")
    assert "finetune: finished already, 3 steps" in capsys.readouterr().out

    other = json.loads((data / "train.json").read_text())
    other[0]["conversations"][1]["value"] = "it is blue"
    (data / "other.json").write_text(json.dumps(other))
    told = fails(model, data / "other.json", *arguments[2:])
    assert "data: train.json (sha256 " in told and "in the checkpoint, other.json (sha256 " in told
    assert "seed: 0 in the checkpoint, 1 now" in fails(*arguments, "--seed", "1")
    assert "lora: None in the checkpoint, " in fails(*arguments, "--lora.rank", "2")
    told = fails(*arguments, "--lr", "0.5")
    assert "lr: 0.001 in the checkpoint, 0.5 now" in told and told.endswith("--may-change lr")
    torch.manual_seed(1)
    VLM(tiny_config("vl-mamba", 290), VLM.from_pretrained(model).tokenizer).save_pretrained(tmp_path / "base")
    assert "weights: " in fails(tmp_path / "base", *arguments[1:])
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    assert {p.name for p in before if before[p] != after[p]} <= {"README.md"}  # the settings in it


def test_a_second_run_on_an_output_is_refused(model, data, tmp_path):
    with only_run_in(tmp_path / "run"):
        told = fails(model, data / "train.json", "--images", data / "images")
    assert f"run is in use by another run (process {os.getpid()} on " in told
    assert not (tmp_path / "run" / "finetune").exists()


def test_other_files_in_the_folder_of_the_model_stay_and_partial_ones_are_removed(model, data, tmp_path):
    folder = tmp_path / "run" / "model"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / ".abc.vlmamba-partial").mkdir()
    train(model, data / "train.json", "--images", data / "images", "--batch-size", "8")
    assert (folder / ".git" / "HEAD").read_text() == "ref" and not list(folder.glob(".*partial"))


def test_empty_data_and_endless_stages_are_errors_before_any_work(model, data, tmp_path):
    (data / "empty.json").write_text("[]")
    for option in ((), ("--dry-run",)):
        assert "stage finetune has nothing to train on: no records in data/empty.json" in fails(
            model, "data/empty.json", *option
        )
        arguments = (model, data / "train.json", "--images", data / "images", *option)
        assert "--epochs must be in" in fails(*arguments, "--epochs", "inf")
        assert "--lr must be in" in fails(*arguments, "--lr", "inf")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").write_text("a file")
    assert "run/model must be a folder" in fails(*arguments[:-1])


@pytest.mark.slow
def test_two_ranks_do_what_one_does_by_the_same_command(model, data, tmp_path):
    arguments = [
        "train", str(model), "data/train.json", "--images", "data/images", "--stage", "both", "--epochs", "1",
        "--batch-size", "8", "--micro-batch-size", "2", "--lr", "0.01", "--sample-every", "3", "--samples", "2",
        "--lora.rank", "2", "--lora.targets", "in_proj", "dt_proj", "--device", "cpu", "--output",
    ]  # fmt: skip
    cli.main([*arguments, "one"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vlmamba"]
    run = subprocess.run([*launcher, *arguments, "two"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("saved two/model") == 1
    for stage in ("align", "finetune"):
        one, two = ([m["loss"] for m in read_metrics(tmp_path / ranks / stage)] for ranks in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4)
        answers = [(tmp_path / ranks / stage / "answers.jsonl").read_text() for ranks in ("one", "two")]
        assert answers[0] == answers[1]
    one, two = (VLM.from_pretrained(tmp_path / ranks / "model").state_dict() for ranks in ("one", "two"))
    for name, p in one.items():
        torch.testing.assert_close(two[name], p, rtol=1e-3, atol=1e-3)


def test_the_help_has_the_recipes_numbers():
    words = {None: "all", True: "on", False: "off"}
    for name, values in RECIPE_DEFAULTS.items():
        for recipe, shown in zip(SHOWN, values, strict=True):
            value = getattr(RECIPES[recipe].finetune, name)
            if isinstance(value, tuple):
                value = " ".join(value)
            elif isinstance(value, bool) or value is None:
                value = words[value]
            elif isinstance(value, float):
                value = f"{value:g}"
            assert shown == str(value), (recipe, name)
