"""`ssm-bench draft`: what a draft model gains.

The model answers the same questions alone and with the draft, by turns, so that a drift of the machine affects all
alike. The time is that of whole answers: images, prompts and tokens. On a CPU it is the processor time, on a GPU the
time by the clock; of several rounds the least counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from tqdm import tqdm

from ..model.generation.config import GenerationConfig
from ..model.generation.speculative import DraftStats
from ..model.lm import MambaLM
from ..model.load import load_model
from ..model.vlm import VLM
from ..train import easy_vqa
from ..train.base_model import saved_model
from ..train.records import Record, read_llava
from ..train.sources import read_visual
from .cases import DTYPES
from .environment import command_line, current_device, environment, synchronize
from .files import write_json
from .options import Draft
from .tables import Row, as_text

ROUNDS = 3


@dataclass(frozen=True)
class Result:
    """The draft at a batch and a number of proposed tokens."""

    batch: int
    draft_tokens: int
    acceptance: float
    tokens_per_step: float
    changed: int
    """Answers that are not those without a draft."""
    speedup: float
    """Time without a draft over that with it."""


def run_draft(command: Draft) -> None:
    """`ssm-bench draft`."""
    with current_device(command.device):
        dtype = None if command.dtype is None else DTYPES[command.dtype]
        model, draft = (
            load_model(saved_model(name), dtype=dtype, device_map=command.device)
            for name in (command.model, command.draft)
        )
        n, ask = prepare(model, draft, choose_records(command), command.question)
        results = measure(n, ask, command)
    heads = ("batch", "draft tokens", "accepted", "tokens a step", "changed answers", "time without / with")
    rows = [
        Row(
            (str(r.batch), str(r.draft_tokens), f"{r.acceptance:.0%}", f"{r.tokens_per_step:.2f}", str(r.changed),
             f"{r.speedup:.2f}")
        )
        for r in results
    ]  # fmt: skip
    print(as_text(heads, rows, names=()))
    write_json(
        command.out,
        {"command": command_line(command), "rows": [asdict(r) for r in results], **environment(command.device)},
    )


def choose_records(command: Draft) -> list[Record]:
    """The first records that have different images, or all of them where they have none.

    Raises:
        FileNotFoundError, ValueError: see `read_llava`; or there is no record.
    """
    records = easy_vqa.load("test") if command.data is None else read_llava(command.data, command.images)
    seen, chosen = set(), []
    for record in records:
        key = tuple(map(str, record.images))
        if key and key in seen:
            continue
        seen.add(key)
        chosen.append(record)
        if len(chosen) == command.limit:
            break
    if not chosen:
        raise ValueError(f"no records in {command.data}")
    return chosen


Ask = Callable[[slice, GenerationConfig, "DraftStats | None"], list[str]]
"""Answers a range of the questions: alone, or with the draft where it is given its counts."""


def prepare(
    model: MambaLM | VLM, draft: MambaLM | VLM, records: Sequence[Record], question: str | None
) -> tuple[int, Ask]:
    """Return the number of questions, and the function that asks them.

    Raises:
        ValueError: one model takes images and the other does not, or a language model is asked about images.
    """
    asked = [record.first_question() for record in records]
    texts = [turn.text if question is None else question for turn, _ in asked]
    if isinstance(model, VLM) and isinstance(draft, VLM):
        model.share_encoders(draft)
        images = [[read_visual(source) for source in sources] for _, sources in asked]

        def ask_about(some: slice, config: GenerationConfig, stats: DraftStats | None) -> list[str]:
            helper = None if stats is None else draft
            return model.generate(texts[some], images[some], config, draft_model=helper, draft_stats=stats)

        return len(texts), ask_about
    if isinstance(model, VLM) or isinstance(draft, VLM):
        raise ValueError("draft must be a model of the same kind: one takes images, and the other does not")
    if any(sources for _, sources in asked):
        raise ValueError("model is a language model, and data has records with images")

    def ask(some: slice, config: GenerationConfig, stats: DraftStats | None) -> list[str]:
        helper = None if stats is None else draft
        return model.generate(texts[some], config, draft_model=helper, draft_stats=stats)

    return len(texts), ask


def measure(n: int, ask: Ask, command: Draft) -> list[Result]:
    """Measure every batch and number of draft tokens, by turns with the model alone.

    Args:
        n, ask: see `prepare`.
        command: the options.
    """
    clock = time.process_time if command.device == "cpu" else time.perf_counter

    def run(batch: int, draft_tokens: int) -> tuple[list[str], DraftStats, float]:
        config, stats = GenerationConfig(command.max_new_tokens, draft_tokens=draft_tokens or 1), DraftStats()
        synchronize(command.device)
        start, answers = clock(), []
        for first in range(0, n, batch):
            answers += ask(slice(first, first + batch), config, stats if draft_tokens else None)
        synchronize(command.device)
        return answers, stats, clock() - start

    results = []
    kinds = (0, *command.draft_tokens)
    with tqdm(total=len(command.batch) * (ROUNDS + 1) * len(kinds), unit="run", file=sys.stderr) as bar:
        for batch in command.batch:
            least = dict.fromkeys(kinds, float("inf"))
            answers: dict[int, list[str]] = {}
            counts: dict[int, DraftStats] = {}
            for turn in range(ROUNDS + 1):
                for kind in kinds:
                    answers[kind], counts[kind], seconds = run(batch, kind)
                    # The first turn compiles, and fills caches.
                    least[kind] = min(least[kind], seconds) if turn else least[kind]
                    bar.update()
            for kind in command.draft_tokens:
                changed = sum(a != b for a, b in zip(answers[kind], answers[0], strict=True))
                stats = counts[kind]
                results.append(
                    Result(batch, kind, stats.acceptance, stats.tokens_per_step, changed, least[0] / least[kind])
                )
    return results
