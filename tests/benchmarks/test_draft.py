"""`ssm-bench draft`: what a draft model gains."""

from __future__ import annotations

import json

import pytest

from tests.makers import VISION, language_config, save_images, shape_tokenizer, sharpened_lm, sharpened_vlm
from vlmamba.benchmarks import cli, draft
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, VLMConfig


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(draft, "ROUNDS", 1)


def conversation(text, image=None):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a red circle"}]
    return {"conversations": turns} | ({"image": image.name} if image else {})


@pytest.fixture
def vlms(tmp_path) -> list[str]:
    """A model, and data of five questions about three images beside it."""
    config = VLMConfig(language_config("mamba2"), (VISION,), ConnectorConfig("mlp"), "qa")
    sharpened_vlm(config, shape_tokenizer()).save_pretrained(tmp_path / "model")
    red, blue, green = save_images(tmp_path, ["red", "blue", "green"])
    asked = [("what color?", red), ("is it red?", red), ("a blue", blue), ("is it?", blue), ("what is it?", green)]
    (tmp_path / "data.json").write_text(json.dumps([conversation(*one) for one in asked]))
    return [str(tmp_path / "model"), str(tmp_path / "model"), "--data", str(tmp_path / "data.json")]


def test_a_model_that_drafts_for_itself_is_always_right(vlms, tmp_path, capsys, monkeypatch):
    asked, generate = [], VLM.generate

    def record(self, questions, images, config, **options):
        asked.append((questions, config.draft_tokens, options["draft_stats"] is not None))
        return generate(self, questions, images, config, **options)

    monkeypatch.setattr(VLM, "generate", record)
    out = tmp_path / "out.json"
    cli.main(["draft", *vlms, "--batch", "1", "3", "--draft-tokens", "2", "3", "--limit", "3", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [(row["batch"], row["draft_tokens"]) for row in result["rows"]] == [(1, 2), (1, 3), (3, 2), (3, 3)]
    for row in result["rows"]:
        assert row["acceptance"] == 1 and row["changed"] == 0 and row["speedup"] > 0
        assert row["tokens_per_step"] == 1 + row["draft_tokens"]
    assert result["command"].startswith("ssm-bench draft") and result["threads"]
    # A question about each image, alone and with the draft in turns, twice.
    one = [(["what color?"], 2, True), (["a blue"], 2, True), (["what is it?"], 2, True)]
    assert [a for a in asked if a[1] == 2 and len(a[0]) == 1] == one * 2
    assert [a[2] for a in asked[:9]] == [False] * 3 + [True] * 6
    assert "tokens a step" in capsys.readouterr().out


def test_another_question_about_all_images(vlms, monkeypatch):
    asked = []
    monkeypatch.setattr(VLM, "generate", lambda self, questions, *_, **__: asked.append(questions) or questions)
    cli.main(["draft", *vlms, "--question", "a red", "--draft-tokens", "1"])
    assert asked == [["a red"]] * 12


def test_language_models(tmp_path, capsys):
    lm = sharpened_lm(language_config("mamba"), shape_tokenizer())
    lm.save_pretrained(tmp_path / "lm")
    (tmp_path / "data.json").write_text(json.dumps([conversation("a red"), conversation("a blue")]))
    name = str(tmp_path / "lm")
    cli.main(["draft", name, name, "--data", str(tmp_path / "data.json"), "--draft-tokens", "4"])
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["1", "4", "100%", "5.00", "0"]


@pytest.mark.parametrize(
    ("of", "message"),
    [("draft", "draft must be a model of the same kind"), ("both", "data has records with images"),
     ("data", "no records in")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(of, message, vlms, tmp_path):
    sharpened_lm(language_config("mamba"), shape_tokenizer()).save_pretrained(tmp_path / "lm")
    options = list(vlms)
    if of in ("draft", "both"):
        options[1] = str(tmp_path / "lm")
    if of == "both":
        options[0] = str(tmp_path / "lm")
    if of == "data":
        (tmp_path / "data.json").write_text("[]")
    with pytest.raises(SystemExit, match=message):
        cli.main(["draft", *options])
