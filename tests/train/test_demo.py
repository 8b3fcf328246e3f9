"""The demo, end to end on a few samples: interrupted anywhere, they go on and end the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from vlmamba.model import VLM
from vlmamba.train import demo, easy_vqa
from vlmamba.train.recipes import FAMILIES, QUICK, DemoRecipe
from vlmamba.train.track import read_metrics

TINY = DemoRecipe(
    *(
        replace(s, batch_size=8, epochs=3 * 8 / n, save_every=2)
        for s, n in ((QUICK.vision, 30), (QUICK.language, 330), (QUICK.align, 30), (QUICK.finetune, 300))
    )
)


def take_little_data(patch: pytest.MonkeyPatch) -> None:
    """300 questions to learn from and 40 to answer."""
    real = easy_vqa.load
    patch.setattr(easy_vqa, "load", lambda split: real(split)[: 300 if split == "train" else 40])


@pytest.fixture
def little_data(monkeypatch):
    take_little_data(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and results of a run that was not interrupted, one model after the other."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        take_little_data(patch)
        return folder, demo.run_demo(TINY, folder)


def test_the_demo_writes_every_documented_file(whole):
    folder, results = whole
    assert set(results) == {"always 'yes'", "vl-mamba, blind", "vl-mamba", "ml-mamba, blind", "ml-mamba"}
    assert json.loads((folder / "results.json").read_text()) == results
    for name in ("learning-curves.png", "samples.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for family in FAMILIES:
        model = VLM.from_pretrained(folder / family / "model")
        assert isinstance(model.generate(["what color is the shape?"], [None])[0], str)
        card = ModelCard.load(folder / family / "model" / "README.md")
        questions = easy_vqa.questions_file("train").read_bytes()
        assert f"{len(questions):,} | `{hashlib.sha256(questions).hexdigest()}` |" in card.content
        assert "### Stage finetune" in card.content
        assert f"| steps | {len(read_metrics(folder / family / 'finetune'))} |" in card.content
        assert str(folder) not in card.content and "More Information" not in card.content
        (evaluation,) = card.data.eval_results
        assert evaluation.metric_value == results[family]["overall"]


@pytest.mark.slow
def test_side_by_side_the_results_are_the_same(whole, tmp_path, little_data, capfd):
    folder, results = whole
    assert demo.run_demo(TINY, tmp_path, cores=2) == results
    for family in FAMILIES:
        assert answers_in(tmp_path / family) == answers_in(folder / family)
    shown = capfd.readouterr()
    assert "always 'yes'" in shown.out
    for name in ("vision", *FAMILIES):
        assert f"{name:<8} | " in shown.err


def test_an_interrupted_demo_resumes_to_the_same_result(whole, tmp_path, little_data, monkeypatch):
    folder, results = whole
    real, calls = demo.train_stage, []

    def fails_later(model, stage, *rest):
        calls.append(stage.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(model, stage, *rest)

    monkeypatch.setattr(demo, "train_stage", fails_later)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(TINY, tmp_path)
    assert demo.run_demo(TINY, tmp_path) == results
    for family in FAMILIES:
        assert answers_in(tmp_path / family) == answers_in(folder / family)


def test_the_fastest_number_of_threads_is_taken_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "pick_threads", lambda step, most: most if step() is None else 0)
    used = []
    monkeypatch.setattr(demo.torch, "set_num_threads", used.append)
    layer = nn.Linear(1, 1)
    arguments = (replace(QUICK.vision, batch_size=2), [torch.ones(1)] * 2, lambda samples: torch.stack(samples))
    model = ReturnsLoss(layer)
    demo.use_fastest_threads(tmp_path, 1, model, *arguments)
    assert used == [1] and not list(tmp_path.iterdir())
    demo.use_fastest_threads(tmp_path, 4, model, *arguments)
    monkeypatch.setattr(demo, "pick_threads", None)
    demo.use_fastest_threads(tmp_path, 4, model, *arguments)
    assert used == [1, 4]
    assert layer.weight.grad is None


class ReturnsLoss(nn.Sequential):
    """Layers whose output has a `loss`."""

    def forward(self, batch):
        return SimpleNamespace(loss=super().forward(batch).sum())


def answers_in(folder):
    return json.loads((folder / "answers.json").read_text())
