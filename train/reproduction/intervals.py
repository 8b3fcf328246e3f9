"""Bootstrap intervals of accuracies and of their differences: the order of models that a few seeds allow to claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
LEVEL = 0.95
"""Coverage of an interval; of differences together, by Bonferroni's correction for their number."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Accuracy of each row, and the difference of each pair of rows."""

    rows: dict[str, Interval]
    pairs: dict[tuple[str, str], Interval]
    """(better, worse) -> difference of their accuracies."""

    def is_claimed(self, pair: tuple[str, str]) -> bool:
        """Whether the interval of a pair's difference leaves out zero, so that their order can be claimed."""
        return self.pairs[pair].low > 0


def compare(correct: Mapping[str, NDArray[np.bool_]], seed: int = 0) -> Comparison:
    """Bootstrap over seeds and questions: both are drawn anew, the questions for all rows alike.

    Args:
        correct: row -> (seeds, questions), whether an answer is right. The questions are the same in each row.
        seed: seed of the resampling.

    Raises:
        ValueError: there is no row, or the rows have different questions.
    """
    questions = {c.shape[1] for c in correct.values()}
    if len(questions) != 1:
        raise ValueError(f"every row must answer the same questions, got {sorted(questions)} of them")
    n = questions.pop()
    rng = np.random.default_rng(seed)
    # The accuracy of each row in each resample.
    drawn = {name: np.empty(RESAMPLES) for name in correct}
    for i in range(RESAMPLES):
        # How often each question is drawn; the same for every row, since a hard question is hard for all.
        weights = np.bincount(rng.integers(n, size=n), minlength=n) / n  # (questions,)
        for name, answers in correct.items():
            seeds = rng.integers(len(answers), size=len(answers))  # (seeds,) with repetition
            drawn[name][i] = (answers @ weights)[seeds].mean()  # (seeds,) -> ()
    means = {name: float(answers.mean()) for name, answers in correct.items()}
    # The better of a pair comes first, so that a claimed difference is above zero.
    ordered = sorted(means, key=lambda name: -means[name])
    pairs = list(combinations(ordered, 2))
    tail = (1 - LEVEL) / 2
    rows = {name: _interval(means[name], drawn[name], tail) for name in correct}
    return Comparison(
        rows,
        {(a, b): _interval(means[a] - means[b], drawn[a] - drawn[b], tail / max(1, len(pairs))) for a, b in pairs},
    )


def _interval(mean: float, drawn: NDArray[np.float64], tail: float) -> Interval:
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def as_text(comparison: Comparison) -> str:
    """Format accuracies with their intervals, and what can be said about the order of each pair."""
    width = max(map(len, comparison.rows))
    lines = [f"{'':<{width}}  accuracy  {LEVEL:.0%} interval"]
    lines += [f"{name:<{width}}  {i.mean:>8.1%}  {i.low:.1%} to {i.high:.1%}" for name, i in comparison.rows.items()]
    for (a, b), i in comparison.pairs.items():
        verdict = f"{a} is better than {b}" if comparison.is_claimed((a, b)) else f"{a} and {b} are not told apart"
        lines.append(f"{verdict}: {100 * i.mean:.1f} points apart, {100 * i.low:+.1f} to {100 * i.high:+.1f}")
    return "\n".join(lines)
