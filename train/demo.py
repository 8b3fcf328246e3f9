"""Demo on real data: a VL-Mamba and an ML-Mamba from scratch to answers about images."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..connectors import ConnectorConfig
from ..model.batch import collate
from ..model.card import CardFacts, Evaluation
from ..model.files import write_atomic, writing_atomic
from ..model.hub import unshared
from ..model.text_files import read_json
from ..model.tokenizer import Tokenizer
from ..model.vit import ViT
from ..model.vlm import VLM
from ..model.weights import load_into
from . import easy_vqa, plots
from .attribute_classifier import AttributeClassifier, AttributeImages, collate_augmented
from .card import TrainedStage, made_with, stage_section
from .config import StageConfig
from .evaluate import answer_all
from .identity import fingerprint
from .loader import Samples
from .loop import train_stage
from .plot_style import pyplot
from .recipes import FAMILIES, TINY_VISION, TURNS, DemoRecipe, Family, tiny_config
from .records import Record
from .samples import Conversations
from .side_by_side import Job, run_side_by_side
from .threads import pick_threads
from .track import read_metrics

CATEGORIES = ("overall", "yes/no", "color", "shape")


class Event(Protocol):
    """An event of `threading` or of `multiprocessing`."""

    def set(self) -> None: ...

    def wait(self) -> bool: ...


def run_demo(
    recipe: DemoRecipe, folder: Path, device: str = "cpu", cores: int = 1, sample_seed: int = 0
) -> dict[str, dict[str, float]]:
    """Train both models on easy-VQA, evaluate them on its test questions, and write everything to `folder`.

    An interrupted run resumes when it is called again.

    Args:
        recipe: the stages.
        folder: folder of the run.
        device: device to train on.
        cores: with several, the encoder and the two models train side by side, each in a process of its own, with as
            many threads as a measurement at the start finds fastest: on two cores, one.
        sample_seed: seed that selects the test questions of the sample page.

    Returns:
        Accuracy by category of each model, of the same language model without images, and of always answering "yes".
    """
    start = time.perf_counter()
    pyplot()  # a package that is missing is an error before the training, not after it
    folder.mkdir(parents=True, exist_ok=True)
    train, test = easy_vqa.load("train"), easy_vqa.load("test")
    # Both models read it from the folder.
    demo_tokenizer(folder, train)
    side_by_side = cores > 1
    has_encoder: Event = multiprocessing.get_context("spawn").Event() if side_by_side else threading.Event()
    # Two of the three processes have work most of the time.
    shared = (recipe, folder, train, test, device, max(1, cores // 2) if side_by_side else None, has_encoder)
    jobs = [Job("vision", _make_encoder, shared), *(Job(f, _make_model, (f, *shared)) for f in FAMILIES)]
    if side_by_side:
        print(f"the encoder and both models train side by side on {cores} cores")
        run_side_by_side(jobs)
    else:
        for job in jobs:
            job.function(*job.args)

    # The most frequent answer is the baseline to beat, and the model without images the next one.
    results = {"always 'yes'": easy_vqa.scores(test, ["yes"] * len(test))}
    answers = {}
    for family in FAMILIES:
        answers[family] = read_json(folder / family / "answers.json")
        results[f"{family}, blind"] = easy_vqa.scores(test, read_json(folder / family / "blind.json"))
        results[family] = easy_vqa.scores(test, answers[family])

    write_atomic(folder / "results.json", json.dumps(results, indent=2) + "\n")
    # From the metrics on disk, so that an interrupted run has complete curves.
    curves = {
        stage: {f: [m["loss"] for m in read_metrics(folder / f / stage)] for f in FAMILIES}
        for stage in ("language", "align", "finetune")
    }
    plots.learning_curves(curves, folder / "learning-curves.png")
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(sample_seed))[:8].tolist()
    plots.sample_page([test[i] for i in chosen], {f: [a[i] for i in chosen] for f, a in answers.items()},
                      folder / "samples.png")  # fmt: skip
    print(results_table(results))
    print(f"\n{time.perf_counter() - start:.0f} s. Curves and samples: {folder}/*.png. Chat with a model:")
    print(f"  vlmamba chat {folder / FAMILIES[0] / 'model'} --image {test[chosen[0]].images[0]}")
    return results


def _make_encoder(
    recipe: DemoRecipe,
    folder: Path,
    train: Sequence[Record],
    test: Sequence[Record],
    device: str,
    most_threads: int | None,
    has_encoder: Event,
) -> None:
    """Train the encoder that both models start from, and save it in `folder/vision/encoder`."""
    encoder = train_encoder(recipe, folder / "vision", train, test, device, most_threads)
    encoder.save_pretrained(folder / "vision" / "encoder")
    has_encoder.set()


def _make_model(
    family: Family,
    recipe: DemoRecipe,
    folder: Path,
    train: Sequence[Record],
    test: Sequence[Record],
    device: str,
    most_threads: int | None,
    has_encoder: Event,
) -> None:
    """Train one model through its stages, and save it and its answers.

    The model goes to `folder/FAMILY/model`, its answers to the test questions to `answers.json`, and those without
    images to `blind.json`.
    """
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    encoder_folder, folder = folder / "vision" / "encoder", folder / family
    model = new_model(family, tokenizer, recipe.finetune.seed)
    described = easy_vqa.captions(train)
    captions = Conversations(described, model, keep_samples=True)
    questions = Conversations(easy_vqa.conversations(train, TURNS), model, keep_samples=True)
    if most_threads is not None:
        use_fastest_threads(folder, most_threads, model, recipe.finetune, questions, collate)

    # A language model from scratch first sees text alone; pretrained ones start at the align stage.
    text = Conversations([Record(r.turns) for r in [*train, *described]], model)
    train_stage(model, recipe.language, text, collate, folder / "language", device)
    cached_answers(folder / "blind.json", model, test, with_images=False)

    # The encoder is frozen from here on, and its own training is the longest stage before.
    has_encoder.wait()
    load_into(model.vision.encoders[0], unshared(ViT.from_pretrained(encoder_folder)), "the trained encoder")
    train_stage(model, recipe.align, captions, collate, folder / "align", device)
    train_stage(model, recipe.finetune, questions, collate, folder / "finetune", device)
    answers = cached_answers(folder / "answers.json", model.eval(), test)
    accuracy = easy_vqa.scores(test, answers)["overall"]
    files = (replace(fingerprint(easy_vqa.questions_file("train")), name="easy-VQA, train/questions.json"),)
    stages = [
        TrainedStage(stage, len(samples), files, folder / stage.name)
        for stage, samples in ((recipe.language, text), (recipe.align, captions), (recipe.finetune, questions))
    ]
    training = "## Training\n\nTrained from scratch on easy-VQA (PyPI, MIT) by `vlmamba demo`."
    facts = CardFacts(
        evaluations=(Evaluation("easy-VQA", "test", "accuracy", accuracy, len(test)),),
        sections=(training, *map(stage_section, stages), made_with()),
    )
    model.save_pretrained(folder / "model", model_card_kwargs={"facts": facts})


def demo_tokenizer(folder: Path, train: Sequence[Record]) -> Tokenizer:
    """Load the tokenizer in the folder; at first, train it on the questions and answers."""
    path = folder / "tokenizer.json"
    if not path.exists():
        texts = [t.text for r in [*train, *easy_vqa.captions(train)] for t in r.turns]
        with writing_atomic(path) as partial:
            Tokenizer.train(texts, vocab_size=400).save(partial)
    return Tokenizer.from_file(path)


def train_encoder(
    recipe: DemoRecipe,
    folder: Path,
    train: Sequence[Record],
    test: Sequence[Record],
    device: str,
    most_threads: int | None = None,
    attributes: Sequence[str] = tuple(easy_vqa.ATTRIBUTES),
) -> ViT:
    """Train the image encoder on the colors and shapes that the training questions determine, or on one of the two."""
    # Seeded before the weights are drawn, so that a resume builds the same model.
    torch.manual_seed(recipe.vision.seed)
    classes = [easy_vqa.ATTRIBUTES[a] for a in attributes]
    model = AttributeClassifier(TINY_VISION.encoder, [len(c) for c in classes])
    images, held_out = (
        AttributeImages(easy_vqa.attributes(records, attributes), classes, TINY_VISION.processor)
        for records in (train, test)
    )
    if most_threads is not None:
        use_fastest_threads(folder, most_threads, model, recipe.vision, images, collate_augmented)
    train_stage(model, recipe.vision, images, collate_augmented, folder, device)
    model.to("cpu")
    told, share = " and ".join(attributes), model.accuracy(held_out)
    print(f"vision encoder: {told} right on {share:.1%} of {len(held_out)} test images")
    model.encoder.processor = TINY_VISION.processor  # saved with it
    return model.encoder


def use_fastest_threads(
    folder: Path,
    most: int,
    model: nn.Module,
    stage: StageConfig,
    samples: Samples,
    collate: Callable[[Sequence[Any]], Any],
) -> None:
    """Let PyTorch use 1 or `most` threads, whichever is faster for a batch of the stage.

    The choice is written to `folder/threads.json`, so that a resume takes it too: sums of other threads are rounded
    otherwise, and it takes exactly the steps that an uninterrupted run would take.
    """
    path = folder / "threads.json"
    if path.exists() or most == 1:
        torch.set_num_threads(read_json(path) if most > 1 else 1)
        return
    # Forward and backward alone: no weight changes.
    batch = collate([samples[i] for i in range(min(stage.batch_size, len(samples)))])
    chosen = pick_threads(lambda: model(batch).loss.backward(), most)
    model.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(chosen))


def new_model(family: Family, tokenizer: Tokenizer, seed: int, connector: ConnectorConfig | None = None) -> VLM:
    """Build a model with random weights."""
    torch.manual_seed(seed)
    return VLM(tiny_config(family, tokenizer.vocab_size, connector), tokenizer)


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
