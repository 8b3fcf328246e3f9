"""Training in model cards: base models, and data and metrics of each stage."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from vlmamba.model.card import CardFacts
from vlmamba.model.presets import CLIP, PRESETS
from vlmamba.train.card import LAST, TrainedStage, card_facts, facts_of_base
from vlmamba.train.config import LoraConfig, StageConfig
from vlmamba.train.identity import Fingerprint


def sections(folder, base="acme/base", losses=(), lora=None) -> str:
    """Sections of the card of one stage."""
    lines = [json.dumps({"step": i, "loss": loss, "grad_norm": 2 * loss}) for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    stage = StageConfig("align", ("connector",), lr=1e-3, lora=lora)
    trained = TrainedStage(stage, 1234, (Fingerprint("a.json", 5678, "ab" * 32),), folder)
    return "\n".join(card_facts(base, "tiny", [trained]).sections)


def test_a_preset_is_based_on_its_pretrained_parts():
    preset = PRESETS["vl-mamba-2.8b-clip-mlp"]
    assert facts_of_base("vl-mamba-2.8b-clip-mlp") == CardFacts((preset.language, CLIP))


def test_a_folder_hands_on_its_card_and_not_its_path(tmp_path):
    """Also where it has the form of a name on the Hub."""
    folder = tmp_path / "acme" / "base"
    folder.mkdir(parents=True)
    assert facts_of_base(str(folder)) == CardFacts()
    ModelCard("---\nbase_model: state-spaces/mamba-130m\nlicense: apache-2.0\n---\n").save(folder / "README.md")
    assert facts_of_base(str(folder)) == CardFacts(("state-spaces/mamba-130m",), "apache-2.0")
    assert str(tmp_path) not in sections(tmp_path, str(folder))


@pytest.mark.parametrize("text", ["no metadata", "---\nbase_model: [a\n---\n"])
def test_a_card_without_readable_metadata_hands_on_nothing(text, tmp_path, caplog):
    (tmp_path / "README.md").write_text(text)
    assert facts_of_base(str(tmp_path)) == CardFacts()
    assert ("cannot be read" in caplog.text) == ("base_model" in text)


def test_data_settings_and_the_last_losses_are_in_the_card(tmp_path):
    losses = [9.0] * 10 + [1.0] * (LAST // 2) + [2.0] * (LAST // 2)
    text = sections(tmp_path, losses=losses, lora=LoraConfig(rank=4))
    assert "Trained from `acme/base` by the recipe `tiny`." in text
    assert f"| a.json | 5,678 | `{'ab' * 32}` |" in text and "| records | 1,234 |" in text
    assert f"| steps | {len(losses):,} |" in text and f"mean of the last {LAST} steps | 1.5000 |" in text
    assert "| gradient norm, likewise | 3.0000 |" in text
    assert re.search(r"\| lora \| rank 4, alpha 32.0, .*in_proj out_proj", text)


def test_a_stage_whose_metrics_are_missing_has_no_loss(tmp_path):
    text = sections(tmp_path)
    assert "| steps | 0 |" in text and "loss, mean" not in text
