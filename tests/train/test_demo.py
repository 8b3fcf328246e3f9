"""The demo and the ablation, end to end on a few samples: interrupted anywhere, they go on and end the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vlmamba.model import VLM
from vlmamba.train import ablate, demo, easy_vqa
from vlmamba.train.recipes import QUICK, DemoRecipe

TINY = DemoRecipe(
    *(
        replace(s, batch_size=8, epochs=3 * 8 / n, save_every=2)
        for s, n in ((QUICK.vision, 30), (QUICK.language, 330), (QUICK.align, 30), (QUICK.finetune, 300))
    )
)


@pytest.fixture
def little_data(monkeypatch):
    """300 questions to learn from and 40 to answer."""
    real = easy_vqa.load
    monkeypatch.setattr(easy_vqa, "load", lambda split: real(split)[: 300 if split == "train" else 40])


def test_the_demo_writes_every_documented_file(tmp_path, little_data, capsys):
    results = demo.run_demo(TINY, tmp_path)
    assert set(results) == {"always 'yes'", "vl-mamba, blind", "vl-mamba", "ml-mamba, blind", "ml-mamba"}
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name in ("learning-curves.png", "samples.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for family in ("vl-mamba", "ml-mamba"):
        model = VLM.from_pretrained(tmp_path / family / "model")
        assert isinstance(model.generate(["what color is the shape?"], [None])[0], str)
    assert "always 'yes'" in capsys.readouterr().out


def test_an_interrupted_demo_resumes_to_the_same_result(tmp_path, little_data, monkeypatch):
    whole = demo.run_demo(TINY, tmp_path / "whole")
    real, calls = demo.train_stage, []

    def fails_later(model, stage, *rest):
        calls.append(stage.name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(model, stage, *rest)

    monkeypatch.setattr(demo, "train_stage", fails_later)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(TINY, tmp_path / "interrupted")
    again = demo.run_demo(TINY, tmp_path / "interrupted")
    assert again == whole
    for family in ("vl-mamba", "ml-mamba"):
        one, two = (json.loads((tmp_path / d / family / "answers.json").read_text()) for d in ("whole", "interrupted"))
        assert one == two


def test_the_ablation_covers_every_variant_and_seed(tmp_path, little_data, capsys):
    table = ablate.run_ablation("ml-mamba", TINY, tmp_path, range(2), 20)
    assert list(table) == list(ablate.variants("ml-mamba"))
    assert all(len(values) == 2 for values in table.values())
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "mamba2-advanced, cross" in capsys.readouterr().out
