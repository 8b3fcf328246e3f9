"""The papers' ablations in miniature: connectors and scans, each with the same seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..connectors import ConnectorConfig, Kind
from ..model.batch import collate
from ..model.files import write_atomic
from ..model.hub import unshared
from ..model.weights import load_into
from . import easy_vqa, plots
from .demo import cached_answers, demo_tokenizer, new_model, train_encoder
from .loop import train_stage
from .recipes import TURNS, DemoRecipe, Family, tiny_config
from .records import Record
from .samples import Conversations

KINDS: dict[Family, tuple[Kind, ...]] = {
    "vl-mamba": ("mlp", "vss-mlp", "vss-l2"),
    "ml-mamba": ("mamba2-mlp", "mamba2-basic", "mamba2-advanced"),
}


def variants(family: Family) -> dict[str, ConnectorConfig]:
    """Connector of each variant. An MLP has no scan."""
    # Only kind and scan vary; widths and state sizes are the demo's.
    base = tiny_config(family, 1).connector
    table = {}
    for kind in KINDS[family]:
        if kind.endswith("mlp") and not kind.startswith("vss"):
            table[kind] = replace(base, kind=kind)
        else:
            for scan in ("bidirectional", "cross"):
                table[f"{kind}, {scan}"] = replace(base, kind=kind, scan=scan)
    return table


def run_ablation(
    family: Family, recipe: DemoRecipe, folder: Path, seeds: Sequence[int], n_test: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Train every variant with every seed from the same encoder and language model, and compare their accuracy.

    Args:
        family: kind of model.
        recipe: the stages.
        folder: folder of the run; an interrupted one resumes.
        seeds: seeds of the connector and of the order of the samples.
        n_test: number of test questions.
        device: device to train on.

    Returns:
        For each variant its accuracy with each seed, on the first `n_test` test questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train, test = easy_vqa.load("train"), easy_vqa.load("test")[:n_test]
    described = easy_vqa.captions(train)
    questions = easy_vqa.conversations(train, TURNS)
    tokenizer = demo_tokenizer(folder, train)
    encoder = train_encoder(recipe, folder / "vision", train, test, device)
    # The language model does not depend on the connector: all variants start from the same one.
    language = new_model(family, tokenizer, recipe.finetune.seed)
    text = Conversations([Record(r.turns) for r in [*train, *described]], language)
    train_stage(language, recipe.language, text, collate, folder / "language", device)
    table: dict[str, list[float]] = {}
    for name, connector in variants(family).items():
        for seed in seeds:
            run_folder = folder / name.replace(", ", "-") / f"seed-{seed}"
            # Only the connector is untrained here, so a difference between variants is the connector's.
            model = new_model(family, tokenizer, seed, connector)
            load_into(model.vision.encoders[0], unshared(encoder), "the trained encoder")
            load_into(model.language_model, unshared(language.language_model), "the trained language model")
            for stage, records in ((recipe.align, described), (recipe.finetune, questions)):
                stage = replace(stage, seed=seed)
                samples = Conversations(records, model, keep_samples=True)
                train_stage(model, stage, samples, collate, run_folder / stage.name, device)
            answers = cached_answers(run_folder / "answers.json", model, test)
            table.setdefault(name, []).append(easy_vqa.scores(test, answers)["overall"])
    write_atomic(folder / "ablation.json", json.dumps(table, indent=2) + "\n")
    plots.ablation_bars(table, folder / "ablation.png")
    print(ablation_table(table))
    return table


def ablation_table(table: dict[str, list[float]]) -> str:
    """Format the mean and standard deviation of each variant as a table of text."""
    width = max(map(len, table))
    lines = [f"{'':<{width}}  accuracy  spread over seeds"]
    for name, values in table.items():
        # Sample standard deviation; one seed has none.
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        lines.append(f"{name:<{width}}  {statistics.mean(values):>8.1%}  {spread:.1%} ({len(values)})")
    return "\n".join(lines)
