"""Demo on real data: a VL-Mamba and an ML-Mamba from scratch to answers about images."""

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
from .attribute_classifier import AttributeClassifier, AttributeImages, collate_augmented
from .evaluate import answer_all
from .loop import train_stage
from .recipes import FAMILIES, TINY_VISION, TURNS, DemoRecipe, Family, tiny_config
from .records import Record
from .samples import Conversations
from .track import read_metrics

CATEGORIES = ("overall", "yes/no", "color", "shape")


def run_demo(
    recipe: DemoRecipe, folder: Path, device: str = "cpu", sample_seed: int = 0
) -> dict[str, dict[str, float]]:
    """Train both models on easy-VQA, evaluate them on its test questions, and write everything to `folder`.

    An interrupted run resumes when it is called again.

    Args:
        recipe: the stages.
        folder: folder of the run.
        device: device to train on.
        sample_seed: seed that selects the test questions of the sample page.

    Returns:
        Accuracy by category of each model, of the same language model without images, and of always answering "yes".
    """
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    train, test = easy_vqa.load("train"), easy_vqa.load("test")
    tokenizer = demo_tokenizer(folder, train)
    encoder = train_encoder(recipe, folder / "vision", train, test, device)

    # The most frequent answer is the baseline to beat, and the model without images the next one.
    results = {"always 'yes'": easy_vqa.scores(test, ["yes"] * len(test))}
    answers = {}
    for family in FAMILIES:
        model = train_family(family, recipe, folder / family, train, tokenizer, encoder, device)
        blind = read_json(folder / family / "blind.json")
        answers[family] = cached_answers(folder / family / "answers.json", model, test)
        results[f"{family}, blind"] = easy_vqa.scores(test, blind)
        results[family] = easy_vqa.scores(test, answers[family])

    write_atomic(folder / "results.json", json.dumps(results, indent=2) + "\n")
    # From the metrics on disk, so that an interrupted run has complete curves.
    curves = {
        stage: {f: [m["loss"] for m in read_metrics(folder / f / stage)] for f in FAMILIES}
        for stage in ("language", "align", "finetune")
    }
    plots.learning_curves(curves, folder / "learning-curves.png")
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(sample_seed))[:16].tolist()
    plots.sample_page([test[i] for i in chosen], {f: [a[i] for i in chosen] for f, a in answers.items()},
                      folder / "samples.png")  # fmt: skip
    print(results_table(results))
    print(f"\n{time.perf_counter() - start:.0f} s. Curves and samples: {folder}/*.png. Chat with a model:")
    print(f"  vlmamba chat {folder / FAMILIES[0] / 'model'} --image {test[chosen[0]].image}")
    return results


def demo_tokenizer(folder: Path, train: Sequence[Record]) -> Tokenizer:
    """Load the tokenizer in the folder; at first, train it on the questions and answers."""
    path = folder / "tokenizer.json"
    if not path.exists():
        texts = [t.text for r in [*train, *easy_vqa.captions(train)] for t in r.turns]
        with writing_atomic(path) as partial:
            Tokenizer.train(texts, vocab_size=400).save(partial)
    return Tokenizer.from_file(path)


def train_encoder(
    recipe: DemoRecipe, folder: Path, train: Sequence[Record], test: Sequence[Record], device: str
) -> ViT:
    """Train the image encoder on the colors and shapes that the training questions determine."""
    # Seeded before the weights are drawn, so that a resume builds the same model.
    torch.manual_seed(recipe.vision.seed)
    classes = (easy_vqa.COLORS, easy_vqa.SHAPES)
    model = AttributeClassifier(TINY_VISION.encoder, [len(c) for c in classes])
    images, held_out = (
        AttributeImages(easy_vqa.attributes(records), classes, TINY_VISION.processor) for records in (train, test)
    )
    train_stage(model, recipe.vision, images, collate_augmented, folder, device)
    model.to("cpu")
    print(f"vision encoder: color and shape right on {model.accuracy(held_out):.1%} of {len(held_out)} test images")
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
    """Train one model through its stages and save it in `folder/model`; answers without images go to `blind.json`."""
    model = new_model(family, tokenizer, encoder, recipe.finetune.seed)
    described = easy_vqa.captions(train)

    # A language model from scratch first sees text alone; pretrained ones start at the align stage.
    text = Conversations([Record(r.turns) for r in [*train, *described]], model)
    train_stage(model, recipe.language, text, collate, folder / "language", device)
    cached_answers(folder / "blind.json", model, easy_vqa.load("test"), with_images=False)
    train_stage(model, recipe.align, Conversations(described, model, True), collate, folder / "align", device)
    questions = Conversations(easy_vqa.conversations(train, TURNS), model, True)
    train_stage(model, recipe.finetune, questions, collate, folder / "finetune", device)
    model.eval().save_pretrained(folder / "model")
    return model


def new_model(
    family: Family, tokenizer: Tokenizer, encoder: ViT, seed: int, connector: ConnectorConfig | None = None
) -> VLM:
    """Build a model with a trained encoder and random weights otherwise."""
    # The seed of the connector and the language model; the encoder is the same in all runs.
    torch.manual_seed(seed)
    model = VLM(tiny_config(family, tokenizer.vocab_size, connector), tokenizer)
    load_into(model.vision.encoders[0], unshared(encoder), "the trained encoder")
    return model


def cached_answers(path: Path, model: VLM, test: Sequence[Record], with_images: bool = True) -> list[str]:
    """Load a model's answers from a file; at first, generate and save them."""
    if not path.exists():
        answers = answer_all(model, test, with_images=with_images)
        write_atomic(path, json.dumps(answers))
    return read_json(path)


def results_table(results: dict[str, dict[str, float]]) -> str:
    """Format accuracies as a table of text."""
    width = max(map(len, results))
    lines = [" " * width + "".join(f"{c:>10}" for c in CATEGORIES)]
    lines += [f"{name:<{width}}" + "".join(f"{row[c]:>10.1%}" for c in CATEGORIES) for name, row in results.items()]
    return "\n".join(lines)
