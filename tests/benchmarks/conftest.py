"""Fixtures of the tests of ssm-bench: a machine whose rates are known, so that none are measured."""

from __future__ import annotations

import pytest

from vlmamba.benchmarks.processor import Rates


@pytest.fixture(autouse=True)
def rates(monkeypatch) -> Rates:
    """Rates of `ssm-bench run` here: 100 GB/s within 1 MiB and 10 beyond, 1 TFLOP/s, 1e9 exponentials/s."""
    known = Rates(1, {2**10: 1e11, 2**20: 1e10}, {2**10: 5e10, 2**20: 5e9}, 1e12, 1e9)
    monkeypatch.setattr("vlmamba.benchmarks.run.measure_rates", lambda threads: known)
    return known
