"""Annotations, easy-VQA, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmamba.model import VLM, GenerationConfig, Tokenizer, Turn, collate
from vlmamba.train import cli, easy_vqa
from vlmamba.train.ablate import ablation_table, variants
from vlmamba.train.config import StageConfig
from vlmamba.train.data import Conversations, Record, read_llava, write_llava
from vlmamba.train.demo import results_table
from vlmamba.train.evaluate import answer_all
from vlmamba.train.loop import train_stage
from vlmamba.train.recipes import FAMILIES, tiny_config
from vlmamba.train.vision import AttributeClassifier, AttributeImages, collate_moved


@pytest.fixture
def images(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / f"{name}.png")
    return tmp_path


def records(folder: Path) -> list[Record]:
    return [Record((Turn("user", "color?"), Turn("assistant", c)), folder / f"{c}.png") for c in ("red", "blue")]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_records_are_read(images, suffix):
    items = [
        {"id": 1, "image": "red.png", "conversations": [
            {"from": "human", "value": "<image>\ncolor?"}, {"from": "gpt", "value": "red"},
            {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]},
        {"id": 2, "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
    ]  # fmt: skip
    path = images / f"data{suffix}"
    path.write_text(json.dumps(items) if suffix == ".json" else "\n".join(map(json.dumps, items)) + "\n")
    first, second = read_llava(path)
    assert first.image == images / "red.png"
    assert [t.role for t in first.turns] == ["user", "assistant", "user", "assistant"]
    assert second == Record((Turn("user", "hello"), Turn("assistant", "hi")))


def test_written_records_come_back(images):
    write_llava(records(images), images / "out.json", images)
    again = read_llava(images / "out.json")
    assert [r.image for r in again] == [r.image for r in records(images)]
    assert again[0].turns[0].text == "<image>\ncolor?"


GOOD = '{"image": "red.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("d.jsonl", GOOD + "\n" + GOOD[:40], ValueError, r"d.jsonl, line 2 is not valid JSON"),
        ("d.json", "[" + GOOD[:60], ValueError, "d.json is not valid JSON"),
        ("d.json", GOOD, ValueError, "must hold a list of records, got dict"),
        ("d.jsonl", "[1]", ValueError, "line 1 must be an object with a list `conversations`"),
        ("d.jsonl", GOOD.replace('"gpt"', '"bot"'), ValueError, "line 1: a turn must be .*'bot'"),
        (
            "d.jsonl",
            GOOD.replace('"gpt"', '"human"'),
            ValueError,
            "line 1: turn 1 of a conversation must be by",
        ),
        ("d.jsonl", GOOD.replace("red.png", "green.png"), FileNotFoundError, "line 1: no image at .*green.png"),
        ("d.json", f"[{GOOD}, {GOOD.replace('red', 'no')}]", FileNotFoundError, "record 1: no image at"),
        ("d.jsonl", GOOD.replace('"red.png"', '["red.png", "blue.png"]'), ValueError, "`image` must be one path"),
        ("d.jsonl", GOOD[: GOOD.index(', {"from": "gpt')] + "]}", ValueError, "the last turn must be an answer"),
    ],
)
def test_malformed_annotations_are_named(images, name, text, error, message):
    (images / name).write_text(text)
    with pytest.raises(error, match=message):
        read_llava(images / name)


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no annotations at"):
        read_llava(tmp_path / "nothing.json")


def test_easy_vqa_is_as_published():
    train, test = easy_vqa.load("train"), easy_vqa.load("test")
    assert (len(train), len(test)) == (38_575, 9_673)
    assert len({r.image for r in [*train, *test]}) == 5_000
    assert len({r.turns[1].text for r in train}) == 13
    assert round(easy_vqa.scores(test, ["yes"] * len(test))["overall"], 3) == 0.373


def test_attributes_agree_with_every_question():
    """What is deduced from some questions about an image contradicts none of the others."""
    train = easy_vqa.load("train")
    known = easy_vqa.attributes(train)
    assert len(known) > 3000
    for record in train:
        if record.image not in known:
            continue
        colour, shape = known[record.image]
        question, answer = (t.text for t in record.turns)
        if answer in easy_vqa.COLOURS:
            assert answer == colour
        elif answer in easy_vqa.SHAPES:
            assert answer == shape
        else:
            words = question.rstrip("?").split()
            named = {w for w in words if w in easy_vqa.COLOURS + easy_vqa.SHAPES}
            holds = named <= {colour, shape}
            assert (answer == "yes") == (holds != bool({"no", "not"} & set(words)))
    caption = easy_vqa.captions(train)[0]
    assert caption.turns[1].text == "a {} {}".format(*known[caption.image])


def test_scores_by_category():
    asked = [Record((Turn("user", ""), Turn("assistant", a))) for a in ("yes", "no", "red", "circle")]
    assert easy_vqa.scores(asked, ["yes", "yes", "red", "square"]) == {
        "overall": 0.5, "yes/no": 0.5, "colour": 1.0, "shape": 0.0,
    }  # fmt: skip


TOKENIZER = Tokenizer.train(["color?", "red", "blue"], 280)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_learns_to_tell_two_images_apart(family, images, tmp_path):
    """The two stages of the demo on two images, then free generation."""
    torch.manual_seed(0)
    model = VLM(tiny_config(family, TOKENIZER.vocab_size), TOKENIZER)
    data = Conversations(records(images), model, keep_images=True)
    align = StageConfig("align", ("connector",), lr=5e-3, epochs=10, batch_size=4, warmup_ratio=0)
    finetune = StageConfig(
        "finetune", ("connector", "language_model"), lr=5e-3, epochs=60, batch_size=4, warmup_ratio=0
    )
    before = {n: p.clone() for n, p in model.named_parameters()}
    train_stage(model, align, data, collate, tmp_path / "align")
    changed = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"connector"}
    train_stage(model, finetune, data, collate, tmp_path / "finetune")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith("vision"))
    assert answer_all(model, records(images), batch_size=1) == ["red", "blue"]
    assert len(set(answer_all(model, records(images), with_images=False))) == 1


def test_a_damaged_image_in_a_set_is_named(images):
    model = VLM(tiny_config("vl-mamba", TOKENIZER.vocab_size), TOKENIZER)
    (images / "blue.png").write_bytes((images / "blue.png").read_bytes()[:50])
    with pytest.raises(ValueError, match="blue.png"):
        Conversations(records(images), model)[1]


def test_an_encoder_learns_attributes(images, tmp_path):
    torch.manual_seed(0)
    attributes = {images / f"{c}.png": (c,) for c in ("red", "blue")}
    data = AttributeImages(attributes, [("blue", "red")], tiny_config("vl-mamba", 1).vision[0].processor)
    model = AttributeClassifier(tiny_config("vl-mamba", 1).vision[0].encoder, [2])
    stage = StageConfig("vision", ("",), lr=1e-3, epochs=20, batch_size=2)
    train_stage(model, stage, data, collate_moved, tmp_path / "vision")
    assert model.accuracy(data) == 1


def test_ablation_covers_connectors_and_scans():
    assert list(variants("vl-mamba")) == [
        "mlp", "vss-mlp, bidirectional", "vss-mlp, cross", "vss-l2, bidirectional", "vss-l2, cross",
    ]  # fmt: skip
    text = ablation_table({"mlp": [0.5, 0.7], "vss-l2, cross": [1.0]})
    assert "60.0%  14.1% (2)" in text
    row = {"overall": 0.5, "yes/no": 0.25, "colour": 1.0, "shape": 0.0}
    assert results_table({"x": row}).splitlines()[1].split() == ["x", "50.0%", "25.0%", "100.0%", "0.0%"]


@pytest.fixture
def saved(images):
    model = VLM(tiny_config("ml-mamba", TOKENIZER.vocab_size), TOKENIZER)
    model.save_pretrained(images / "model")
    return images / "model"


def test_the_command_trains_evaluates_and_generates(saved, images, capsys):
    write_llava(records(images) * 4, images / "data.json", images)
    cli.main(["train", str(saved), str(images / "data.json"), "--output", str(images / "run"), "--epochs", "2",
              "--batch-size", "4", "--micro-batch-size", "2"])  # fmt: skip
    trained = VLM.from_pretrained(images / "run" / "model")
    start = VLM.from_pretrained(saved)
    assert not torch.equal(trained.connector.mlp[0].weight, start.connector.mlp[0].weight)
    cli.main(["evaluate", str(images / "run" / "model"), "--data", str(images / "data.json")])
    cli.main(["generate", str(images / "run" / "model"), "color?", "--image", str(images / "red.png"),
              "--max-new-tokens", "4"])  # fmt: skip
    out = capsys.readouterr().out
    assert "exact match" in out
    want = trained.generate(["color?"], [images / "red.png"], GenerationConfig(4))[0]
    assert out.rstrip("\n").endswith(want.rstrip("\n"))


def test_chat_obeys_its_commands(saved, images, monkeypatch, capsys):
    lines = iter(
        ["/image nowhere.png", f"/image {images / 'red.png'}", "color?", "/dance", "/reset", "color?", "/quit"]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    cli.main(["chat", str(saved), "--max-new-tokens", "3"])
    out = capsys.readouterr().out
    assert "no image at nowhere.png" in out
    assert "no command /dance" in out
    assert next(lines, None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "no-such-folder/model", "hello"], "vlmamba: "),
        (["train", "nowhere", "data.json", "--output", "out"], "no annotations at data.json"),
    ],
)
def test_what_goes_wrong_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert message in str(end.value)


@pytest.mark.parametrize("command", [[], ["train"], ["demo"], ["chat"], ["ablate"]])
def test_help_is_there(command):
    out = subprocess.run(
        [sys.executable, "-m", "vlmamba.train.cli", *command, "--help"], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0
    assert "usage: vlmamba" in out.stdout


def test_conversations_ask_every_question_once_about_one_image_each():
    train = easy_vqa.load("train")[:500]
    joined = easy_vqa.conversations(train, 4)
    assert max(len(r.turns) for r in joined) == 8
    asked = sorted((r.image, q.text, a.text) for r in joined for q, a in zip(r.turns[::2], r.turns[1::2], strict=True))
    assert asked == sorted((r.image, *(t.text for t in r.turns)) for r in train)
