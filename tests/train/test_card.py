"""Model cards: front matter, data and metrics of each stage."""

import json
import re

import pytest

from vlmamba.train.card import LAST, TrainedStage, write_card
from vlmamba.train.config import LoraConfig, StageConfig
from vlmamba.train.identity import Fingerprint


def card(folder, base="acme/base", losses=(), lora=None):
    """Write the card of one stage and return its text."""
    stage_folder = folder / "align"
    stage_folder.mkdir()
    lines = [json.dumps({"step": i, "loss": loss, "grad_norm": 2 * loss}) for i, loss in enumerate(losses)]
    (stage_folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    stage = StageConfig("align", ("connector",), lr=1e-3, lora=lora)
    trained = TrainedStage(stage, 1234, (Fingerprint("a.json", 5678, "ab" * 32),), stage_folder)
    write_card(folder, base, "tiny", [trained], "qa")
    return (folder / "README.md").read_text()


@pytest.mark.parametrize(("base", "named"), [("acme/base", True), ("vl-mamba-2.8b", False), ("runs/a/model", False)])
def test_only_a_name_of_the_hub_is_a_base_model(base, named, tmp_path):
    """The Hub refuses a card whose base_model is none of its names."""
    front = card(tmp_path, base).split("---")[1]
    assert (f"base_model: {base}" in front) == named


def test_a_folder_of_the_same_form_as_a_hub_name_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "base").mkdir(parents=True)
    assert "base_model" not in card(tmp_path).split("---")[1]


def test_data_settings_and_the_last_losses_are_in_the_card(tmp_path):
    losses = [9.0] * 10 + [1.0] * (LAST // 2) + [2.0] * (LAST // 2)
    text = card(tmp_path, losses=losses, lora=LoraConfig(rank=4))
    assert f"| a.json | 5,678 | `{'ab' * 32}` |" in text and "| records | 1,234 |" in text
    assert f"| steps | {len(losses):,} |" in text and f"mean of the last {LAST} steps | 1.5000 |" in text
    assert "| gradient norm, likewise | 3.0000 |" in text
    assert re.search(r"\| lora \| rank 4, alpha 32.0, .*in_proj out_proj", text)


def test_a_stage_whose_metrics_are_missing_has_a_card_without_a_loss(tmp_path):
    text = card(tmp_path)
    assert "| steps | 0 |" in text and "loss, mean" not in text
