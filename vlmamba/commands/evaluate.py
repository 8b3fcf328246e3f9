"""`vlmamba evaluate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ..model.fields import Interval, Size
from .options import Group, Loading, Positional

if TYPE_CHECKING:
    from ..train.evaluation_sets import EvaluationSet


@dataclass
class Evaluate:
    """Ask a saved model the questions of a test set, and print its figures.

    Without --data they are easy-VQA's test questions.

    Examples:
    $ vlmamba evaluate runs/demo-quick/vl-mamba/model
    $ vlmamba evaluate runs/mine/model --data data/test.json --output answers.json
    $ vlmamba evaluate runs/mine/model --benchmark vizwiz --data VizWiz/val.json --images VizWiz/val
    $ vlmamba evaluate runs/mine/model --benchmark vsr --data vsr/test.jsonl --images vsr/images
    $ vlmamba evaluate runs/mine/model --benchmark refcoco --data "refcoco+/refs(unc).p" --images train2014
    $ vlmamba evaluate runs/mine/model --benchmark refcoco --data RefCOCO/data --split testA
    """

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    data: Path | None = None
    """Annotations: conversations in LLaVA's format, whose first questions are asked; or the benchmark's own file. For
    refcoco also a folder of the Hub's parquet files, which hold the images."""
    images: Path | None = None
    """Folder or archive that image paths in the data are relative to; the file's own folder by default."""
    benchmark: Literal["vizwiz", "vsr", "refcoco"] | None = None
    """Benchmark that the data is of, in its published format; its prompts and metric are those of the papers' tables.
    refcoco is RefCOCO, RefCOCO+ or RefCOCOg."""
    split: str | None = None
    """Split of refcoco: val by default, testA, testB or test."""
    output: Path | None = None
    """JSON file for the figures and all answers."""
    batch_size: Size = 256
    """Questions that are answered together."""
    max_new_tokens: Annotated[int, Interval("[0, inf)")] = 32
    """Longest answer, in tokens."""
    loading: Group[Loading] = Loading()

    def run(self) -> None:
        from ..model.files import write_atomic
        from ..model.vlm import VLM
        from .loading import load

        if self.benchmark is not None and self.data is None:
            raise ValueError(f"--benchmark {self.benchmark} needs --data, its annotations")
        if self.benchmark is None and self.split is not None:
            raise ValueError("--split is for --benchmark refcoco")
        questions = self._questions()
        # Before the questions are asked, which may take hours.
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
        model = load(self.model, self.loading)
        if not isinstance(model, VLM):
            raise ValueError(f"{self.model} is a language model, which sees no images")
        answers = questions.ask(model, self.batch_size, self.max_new_tokens)
        figures = questions.scores(answers)
        for name, share in figures.items():
            print(f"{name:<14} {share:.2%}")
        print(f"of {len(answers):,} questions")
        if self.output is not None:
            write_atomic(self.output, json.dumps({"figures": figures, "answers": answers}, indent=1) + "\n")

    def _questions(self) -> EvaluationSet:
        from ..train import easy_vqa
        from ..train.evaluation_sets import Conversations, EasyVQA, read_benchmark
        from ..train.records import read_llava

        if self.data is None:
            return EasyVQA(easy_vqa.load("test"))
        if self.benchmark is not None:
            return read_benchmark(self.benchmark, self.data, self.images, self.split)
        records = read_llava(self.data, self.images)
        if not len(records):
            raise ValueError(f"no records in {self.data}")
        return Conversations(records)
