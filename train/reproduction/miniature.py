"""Rows of a paper's table in miniature: tiny models on easy-VQA, each with the same seeds, in about an hour."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...model.batch import collate
from ...model.files import write_atomic
from ...model.hub import unshared
from ...model.lm import MambaLM
from ...model.text_files import read_json
from ...model.tokenizer import Tokenizer
from ...model.vit import ViT
from ...model.vlm import VLM
from ...model.weights import load_into
from .. import easy_vqa, plots
from ..demo import cached_answers, demo_tokenizer, train_encoder
from ..loop import train_stage
from ..plot_style import pyplot
from ..recipes import TURNS, DemoRecipe, tiny_config
from ..records import Record
from ..samples import Conversations
from ..side_by_side import Job, run_side_by_side
from .intervals import Comparison, as_text, compare
from .tables import Miniature, PaperRow, PaperTable


def run_miniature(
    table: PaperTable,
    rows: Mapping[str, PaperRow],
    recipe: DemoRecipe,
    folder: Path,
    seeds: Sequence[int],
    n_test: int,
    processes: int = 1,
    device: str = "cpu",
) -> Comparison:
    """Train every row with every seed, and compare their accuracies by bootstrap intervals.

    Encoders and language models do not depend on the seed: each is trained once, and all rows that have it share it.
    Only the connector is new, so a difference is that of what the row changes and of the seed. An interrupted run
    resumes when it is called again.

    Args:
        table: the table.
        rows: its rows to run.
        recipe: the stages.
        folder: folder of the run.
        seeds: seeds of the connector and of the order of the samples.
        n_test: number of test questions.
        processes: runs at the same time, of one thread each.
        device: device to train on.

    Returns:
        The comparison; `results.json`, `intervals.png` and the answers of each run are in `folder`.
    """
    pyplot()  # a package that is missing is an error before the training, not after it
    folder.mkdir(parents=True, exist_ok=True)
    train, test = easy_vqa.load("train"), easy_vqa.load("test")[:n_test]
    tokenizer = demo_tokenizer(folder, train)
    for row in rows.values():
        for attributes in row.miniature.encoders:
            _make_encoder(recipe, folder, train, test, attributes, device)
        _make_language_model(recipe, folder, train, tokenizer, row.miniature, device)
    # Seeds in the outer loop: an interrupted run has every row at some seeds, not some rows at every seed.
    tasks = [(row.miniature, seed) for seed in seeds for row in rows.values()]
    shared = (recipe, folder, train, test, device)
    if processes > 1:
        jobs = [Job(f"run {i + 1}", _train_all, (tasks[i::processes], *shared)) for i in range(processes)]
        run_side_by_side(jobs)
    else:
        _train_all(tasks, *shared)
    # Exact match, as in `easy_vqa.scores`.
    truths = [r.turns[1].text for r in test]
    correct: dict[str, NDArray[np.bool_]] = {}
    for label, row in rows.items():
        answers = [read_json(_run_folder(folder, row.miniature, seed) / "answers.json") for seed in seeds]
        correct[label] = np.array(
            [[a.strip() == t for a, t in zip(run, truths, strict=True)] for run in answers]
        )  # (seeds, questions)
    comparison = compare(correct)
    accuracies = {label: [float(a) for a in c.mean(1)] for label, c in correct.items()}
    write_atomic(folder / "results.json", json.dumps({"title": table.title, "accuracy": accuracies}, indent=2) + "\n")
    plots.accuracy_intervals(accuracies, comparison.rows, folder / "intervals.png")
    print(f"{table.title}, in miniature: easy-VQA, {len(test):,} questions, {len(seeds)} seeds")
    print(as_text(comparison))
    return comparison


def _train_all(
    tasks: Sequence[tuple[Miniature, int]],
    recipe: DemoRecipe,
    folder: Path,
    train: Sequence[Record],
    test: Sequence[Record],
    device: str,
) -> None:
    """Align, finetune and test the model of each row and seed."""
    # One thread each: the models are too small for more.
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    described, questions = easy_vqa.captions(train), easy_vqa.conversations(train, TURNS)
    for row, seed in tasks:
        run_folder = _run_folder(folder, row, seed)
        # Written last, so that a run with answers is finished.
        if (run_folder / "answers.json").exists():
            continue
        # The connector keeps the weights of the seed; all else is loaded.
        model = _new_model(row, tokenizer, seed)
        for encoder, attributes in zip(model.vision.encoders, row.encoders, strict=True):
            trained = ViT.from_pretrained(_encoder_folder(folder, attributes) / "encoder")
            load_into(encoder, unshared(trained), "the trained encoder")
        language = MambaLM.from_pretrained(_language_folder(folder, row) / "model")
        load_into(model.language_model, unshared(language), "the trained language model")
        for stage, records in ((recipe.align, described), (recipe.finetune, questions)):
            stage = replace(stage, seed=seed)
            samples = Conversations(records, model, keep_samples=True)
            train_stage(model, stage, samples, collate, run_folder / stage.name, device)
        cached_answers(run_folder / "answers.json", model, test)


def _right(answers: Sequence[str], truths: Sequence[str]) -> list[bool]:
    return [answer.strip() == truth for answer, truth in zip(answers, truths, strict=True)]


def _make_encoder(
    recipe: DemoRecipe,
    folder: Path,
    train: Sequence[Record],
    test: Sequence[Record],
    attributes: tuple[str, ...],
    device: str,
) -> None:
    """Train an encoder to tell these attributes, unless it was."""
    folder = _encoder_folder(folder, attributes)
    if not (folder / "encoder").exists():
        train_encoder(recipe, folder, train, test, device, attributes=attributes).save_pretrained(folder / "encoder")


def _make_language_model(
    recipe: DemoRecipe, folder: Path, train: Sequence[Record], tokenizer: Tokenizer, row: Miniature, device: str
) -> None:
    """Train a row's language model on text alone, unless it was."""
    folder = _language_folder(folder, row)
    if (folder / "model").exists():
        return
    # With the demo's connector and encoder, which are drawn first and play no part.
    usual = replace(row, connector=tiny_config(row.family, 1).connector, encoders=(("color", "shape"),))
    model = _new_model(usual, tokenizer, recipe.language.seed)
    text = Conversations([Record(r.turns) for r in [*train, *easy_vqa.captions(train)]], model)
    stage = replace(recipe.language, epochs=recipe.language.epochs * row.text)
    train_stage(model, stage, text, collate, folder / "language", device)
    model.language_model.save_pretrained(folder / "model")


def _new_model(row: Miniature, tokenizer: Tokenizer, seed: int) -> VLM:
    """Build a row's model with random weights."""
    torch.manual_seed(seed)
    config = tiny_config(row.family, tokenizer.vocab_size, row.connector)
    language = replace(config.language, d_model=row.width, layer=row.layer)
    return VLM(replace(config, language=language, vision=config.vision * len(row.encoders)), tokenizer)


def _encoder_folder(folder: Path, attributes: tuple[str, ...]) -> Path:
    return folder / f"vision-{'-'.join(attributes)}"


def _language_folder(folder: Path, row: Miniature) -> Path:
    return folder / f"language-{row.family}-{row.layer}-{row.width}-{row.text:g}"


def _run_folder(folder: Path, row: Miniature, seed: int) -> Path:
    """A folder named by the row's settings: rows of several tables that are the same model share their runs."""
    digest = hashlib.sha256(json.dumps(asdict(row), sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"row-{digest}" / f"seed-{seed}"
