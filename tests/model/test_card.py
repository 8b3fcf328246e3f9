"""Model cards: metadata that the Hub reads, code that runs, on each road by which a model is saved."""

import re

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, ImageProcessor, LMConfig, MambaLM, Tokenizer, VisionConfig, ViT, ViTConfig, VLMConfig
from vlmamba.model.card import CardFacts, Evaluation, facts_of
from vlmamba.model.convert import convert

LANGUAGE = LMConfig(d_model=16, n_layer=1, vocab_size=300, layer="mamba2", headdim=8)
ENCODER = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_width=16, feature_layer=-1)


def vlm() -> VLM:
    config = VLMConfig(LANGUAGE, (VisionConfig(ENCODER, ImageProcessor(16)),), ConnectorConfig("mlp"), template="qa")
    return VLM(config, Tokenizer.train(["What is this?"], vocab_size=300))


def vit() -> ViT:
    model = ViT(ENCODER)
    model.processor = ImageProcessor(16)
    return model


MODELS = {
    "image-text-to-text": vlm,
    "text-generation": lambda: MambaLM(LANGUAGE),
    "image-feature-extraction": vit,
    "image-feature-extraction on pixels": lambda: ViT(ENCODER),
}


@pytest.mark.parametrize("task", MODELS)
def test_a_saved_model_has_a_card_whose_code_runs(task, tmp_path, monkeypatch, capsys):
    MODELS[task]().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "vl-mamba" and card.data.pipeline_tag == task.split()[0]
    assert "More Information Needed" not in card.content and str(tmp_path) not in card.content
    (code,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 16), "red").save("picture.png")
    exec(code, {})  # what a reader pastes
    assert capsys.readouterr().out


def test_parts_and_papers_are_those_of_the_config(tmp_path):
    model = vlm()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for name, part in model.named_children():
        assert f"| {name} | {sum(p.numel() for p in part.parameters()):,} |" in text
    assert "2405.21060" in text and "2403.13600" in text and "2407.19832" not in text
    assert "arxiv:2405.21060" in ModelCard(text).data.tags


def test_evaluations_are_in_the_table_and_in_the_metadata(tmp_path):
    facts = CardFacts(("a/b",), "mit", (Evaluation("easy-VQA", "test", "accuracy", 0.975, 9673),), ("## More\n\ntext",))
    vlm().save_pretrained(tmp_path, model_card_kwargs={"facts": facts})
    card = ModelCard.load(tmp_path / "README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_value) == ("easy-VQA", "test", 0.975)
    assert "| easy-VQA | test | 9,673 | accuracy | 0.9750 |" in card.content and "## More\n\ntext" in card.content
    assert card.data.base_model == ["a/b"] and card.data.license == "mit"
    assert facts_of(tmp_path) == CardFacts(("a/b",), "mit")


def test_a_card_that_is_there_stays_unless_there_are_facts_for_a_new_one(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    vlm().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    vlm().save_pretrained(tmp_path, model_card_kwargs={"facts": CardFacts(("a/b",))})
    assert ModelCard.load(tmp_path / "README.md").data.base_model == ["a/b"]


@pytest.mark.parametrize("to", ["own", "state-spaces", "transformers"])
def test_a_converted_model_keeps_its_card_or_gets_one(to, tmp_path):
    MambaLM(LANGUAGE).save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "kept", to=to)
    src, kept = ((tmp_path / name / "README.md").read_text() for name in ("src", "kept"))
    assert kept.startswith(src.rstrip()) and "## Layout" in kept.removeprefix(src.rstrip())
    (tmp_path / "src" / "README.md").unlink()
    convert(tmp_path / "src", tmp_path / "made", to=to)
    made = ModelCard.load(tmp_path / "made" / "README.md")
    assert made.data.pipeline_tag == "text-generation" and "## Layout" in made.content


def test_a_card_names_the_last_conversion_alone(tmp_path):
    MambaLM(LANGUAGE).save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="state-spaces")
    convert(tmp_path / "b", tmp_path / "c", to="transformers")
    text = (tmp_path / "c" / "README.md").read_text()
    assert text.count("## Layout") == 1 and "of `transformers`" in text and "`mamba_ssm`" not in text


def test_a_converted_vision_language_model_has_a_card(tmp_path):
    model = vlm()
    model.save_pretrained(tmp_path / "src", model_card_kwargs={"facts": CardFacts(license="mit")})
    convert(tmp_path / "src", tmp_path / "dst")
    assert ModelCard.load(tmp_path / "dst" / "README.md").data.license == "mit"
