"""The whole path on real data: a VL-Mamba and an ML-Mamba from nothing to answers about images."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..connectors import ConnectorConfig
from ..model.batch import collate
from ..model.files import write_atomic, writing_atomic
from ..model.hub import unshared
from ..model.text_files import read_json
from ..model.tokenizer import Tokenizer
from ..model.vit import ViT
from ..model.vlm import VLM
from ..model.weights import load_into
from . import easy_vqa, plots
from .attribute_classifier import AttributeClassifier, AttributeImages, collate_moved
from .evaluate import answer_all
from .loop import train_stage
from .recipes import FAMILIES, TINY_VISION, TURNS, DemoRecipe, Family, tiny_config
from .records import Record
from .samples import Conversations
from .track import read_metrics

CATEGORIES = ("overall", "yes/no", "colour", "shape")


def run_demo(
    recipe: DemoRecipe, folder: Path, device: str = "cpu", sample_seed: int = 0
) -> dict[str, dict[str, float]]:
    """Train both models on easy-VQA, evaluate them on its test questions, and leave everything in `folder`.

    Interrupted, it goes on where it was when it is called again.

    Returns:
        Accuracy by category of each model, of the same language model without images, and of always saying "yes".
    """
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    train, test = easy_vqa.load("train"), easy_vqa.load("test")
    tokenizer = demo_tokenizer(folder, train)
    encoder = train_encoder(recipe, folder / "vision", train, test, device)

    results = {"always 'yes'": easy_vqa.scores(test, ["yes"] * len(test))}
    answers = {}
    for family in FAMILIES:
        model = train_family(family, recipe, folder / family, train, tokenizer, encoder, device)
        blind = read_json(folder / family / "blind.json")
        answers[family] = kept_answers(folder / family / "answers.json", model, test)
        results[f"{family}, blind"] = easy_vqa.scores(test, blind)
        results[family] = easy_vqa.scores(test, answers[family])

    write_atomic(folder / "results.json", json.dumps(results, indent=2) + "\n")
    curves = {
        stage: {f: [m["loss"] for m in read_metrics(folder / f / stage)] for f in FAMILIES}
        for stage in ("language", "align", "finetune")
    }
    plots.learning_curves(curves, folder / "learning-curves.png")
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(sample_seed))[:16].tolist()
    plots.sample_page([test[i] for i in chosen], {f: [a[i] for i in chosen] for f, a in answers.items()},
                      folder / "samples.png")  # fmt: skip
    print(results_table(results))
    print(f"\n{time.perf_counter() - start:.0f} s. Curves and samples: {folder}/*.png. Talk to a model:")
    print(f"  vlmamba chat {folder / FAMILIES[0] / 'model'} --image {test[chosen[0]].image}")
    return results


def demo_tokenizer(folder: Path, train: Sequence[Record]) -> Tokenizer:
    """A tokenizer trained on the questions and answers, kept in the folder."""
    path = folder / "tokenizer.json"
    if not path.exists():
        texts = [t.text for r in [*train, *easy_vqa.captions(train)] for t in r.turns]
        with writing_atomic(path) as partial:
            Tokenizer.train(texts, vocab_size=400).save(partial)
    return Tokenizer.from_file(path)


def train_encoder(
    recipe: DemoRecipe, folder: Path, train: Sequence[Record], test: Sequence[Record], device: str
) -> ViT:
    """The image encoder, trained on the colours and shapes that the training questions tell."""
    torch.manual_seed(recipe.vision.seed)
    classes = (easy_vqa.COLOURS, easy_vqa.SHAPES)
    model = AttributeClassifier(TINY_VISION.encoder, [len(c) for c in classes])
    images, held_out = (
        AttributeImages(easy_vqa.attributes(records), classes, TINY_VISION.processor) for records in (train, test)
    )
    train_stage(model, recipe.vision, images, collate_moved, folder, device)
    model.to("cpu")
    print(f"vision encoder: colour and shape right on {model.accuracy(held_out):.1%} of {len(held_out)} test images")
    return model.encoder


def train_family(
    family: Family,
    recipe: DemoRecipe,
    folder: Path,
    train: Sequence[Record],
    tokenizer: Tokenizer,
    encoder: ViT,
    device: str,
) -> VLM:
    """One model through its stages; `folder/model` holds it in the end, `folder/blind.json` the blind answers."""
    model = new_model(family, tokenizer, encoder, recipe.finetune.seed)
    described = easy_vqa.captions(train)

    text = Conversations([Record(r.turns) for r in [*train, *described]], model)
    train_stage(model, recipe.language, text, collate, folder / "language", device)
    kept_answers(folder / "blind.json", model, easy_vqa.load("test"), with_images=False)
    train_stage(model, recipe.align, Conversations(described, model, True), collate, folder / "align", device)
    questions = Conversations(easy_vqa.conversations(train, TURNS), model, True)
    train_stage(model, recipe.finetune, questions, collate, folder / "finetune", device)
    model.eval().save_pretrained(folder / "model")
    return model


def new_model(
    family: Family, tokenizer: Tokenizer, encoder: ViT, seed: int, connector: ConnectorConfig | None = None
) -> VLM:
    """An untrained model around a trained encoder."""
    torch.manual_seed(seed)
    model = VLM(tiny_config(family, tokenizer.vocab_size, connector), tokenizer)
    load_into(model.vision.encoders[0], unshared(encoder), "the trained encoder")
    return model


def kept_answers(path: Path, model: VLM, test: Sequence[Record], with_images: bool = True) -> list[str]:
    """A model's answers, given once and kept in a file."""
    if not path.exists():
        answers = answer_all(model, test, with_images=with_images)
        write_atomic(path, json.dumps(answers))
    return read_json(path)


def results_table(results: dict[str, dict[str, float]]) -> str:
    """Accuracies as lines of text."""
    width = max(map(len, results))
    lines = [" " * width + "".join(f"{c:>10}" for c in CATEGORIES)]
    lines += [f"{name:<{width}}" + "".join(f"{row[c]:>10.1%}" for c in CATEGORIES) for name, row in results.items()]
    return "\n".join(lines)
