"""ssm-bench compare: regressions between two files, matched rows, and the statistics."""

from __future__ import annotations

import json

import pytest
import torch

from vlmamba.benchmarks import cli
from vlmamba.benchmarks.compare import compare, holm, mann_whitney, regressions, unmatched


def test_mann_whitney_is_that_of_the_tables():
    # Exact two-sided p values, of all orders: 2 / C(6, 3), and 4 / C(10, 5) for U = 1.
    assert mann_whitney([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)
    assert mann_whitney([1, 2, 3, 4, 6], [5, 7, 8, 9, 10]) == pytest.approx(4 / 252)
    assert mann_whitney([1.0] * 9, [1.0] * 9) == 1
    assert mann_whitney([1.0], [2.0, 3.0]) == 1


def test_mann_whitney_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for n, m, digits in ((5, 8, 9), (15, 15, 9), (20, 30, 9), (40, 50, 9), (12, 12, 1)):
        x = torch.rand(n, generator=generator, dtype=torch.float64)
        y = torch.rand(m, generator=generator, dtype=torch.float64) + 0.2
        x, y = (t.mul(10**digits).round().tolist() for t in (x, y))  # of one digit: with ties
        is_exact = digits > 1 and n + m <= 60
        method = "exact" if is_exact else "asymptotic"
        assert mann_whitney(x, y) == pytest.approx(stats.mannwhitneyu(x, y, method=method).pvalue)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def written(path, seconds, **changes):
    times = {"median": sorted(seconds)[len(seconds) // 2], "low": 0, "high": 0, "calls": len(seconds)}
    row = {"impl": "torch", "mode": "fwd", "time": {**times, "seconds": seconds}}
    case = {"op": "ssd", "name": "default", "threads": 1, "shape": {"length": 8}, "rows": [row]}
    case |= {key: changes.pop(key) for key in list(changes) if key in case}
    result = {"op": "ssd", "dtype": "fp32", "device": "a", "cases": [case]}
    path.write_text(json.dumps(result | changes))
    return path


def test_a_regression_is_slow_by_enough_and_not_by_chance(tmp_path, capsys):
    before = written(tmp_path / "a.json", [1 + 0.001 * i for i in range(15)])
    slower = written(tmp_path / "b.json", [1.2 + 0.001 * i for i in range(15)])
    barely = written(tmp_path / "c.json", [1.02 + 0.001 * i for i in range(15)])
    noisy = written(tmp_path / "d.json", [0.8, 0.9, 1.2, 1.3, 1.4])
    assert len(regressions(compare(before, slower), 0.05, 0.01)) == 1
    for after in (barely, noisy, before):
        assert not regressions(compare(before, after), 0.05, 0.01)
    assert not regressions(compare(slower, before), 0.05, 0.01)
    cli.main(["compare", str(before), str(barely)])
    with pytest.raises(SystemExit) as e:
        cli.main(["compare", str(before), str(slower)])
    assert e.value.code == 1
    assert "REGRESSION" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["compare", str(before), str(barely), "--threshold", "0.01"])


def test_a_drift_of_the_machine_is_no_regression_relative_to_what_did_not_change(tmp_path):
    def rows(torch_seconds, peer_seconds):
        sides = {"torch": torch_seconds, "fla": peer_seconds}
        times = {k: {"median": v[7], "calls": len(v), "seconds": v} for k, v in sides.items()}
        return [{"impl": impl, "mode": "fwd", "time": time} for impl, time in times.items()]

    drift = [1 + 0.01 * i for i in range(15)]
    before = written(tmp_path / "a.json", [1.0], rows=rows(drift, drift))
    drifted = written(tmp_path / "b.json", [1.0], rows=rows([2 * t for t in drift], [2 * t for t in drift]))
    slower = written(tmp_path / "c.json", [1.0], rows=rows([3 * t for t in drift], [2 * t for t in drift]))
    assert len(regressions(compare(before, drifted), 0.05, 0.01)) == 2
    assert not regressions(compare(before, drifted, "fla"), 0.05, 0.01)
    (row,) = regressions(compare(before, slower, "fla"), 0.05, 0.01)
    assert row.impl == "torch" and row.ratio == pytest.approx(1.5)
    with pytest.raises(ValueError, match="has not as many calls of transformers in mode fwd"):
        compare(before, slower, "transformers")


def test_files_that_do_not_compare_are_refused(tmp_path):
    before = written(tmp_path / "a.json", [1.0, 1.1])
    for field, value in {"device": "b", "dtype": "bf16"}.items():
        with pytest.raises(ValueError, match=f"do not compare: {field} is"):
            compare(before, written(tmp_path / "b.json", [1.0, 1.1], **{field: value}))
    nothing = [{"impl": "fla", "mode": "fwd", "missing": "no"}]
    for changes in ({"rows": nothing}, {"shape": {"length": 9}}, {"threads": 2}):
        with pytest.raises(ValueError, match="no sizes, implementation and mode in common"):
            compare(before, written(tmp_path / "b.json", [1.0], **changes))
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a report of this version's ssm-bench run"):
        compare(before, tmp_path / "b.json")
    with pytest.raises(SystemExit, match="ssm-bench: .*absent.json"):
        cli.main(["compare", str(before), str(tmp_path / "absent.json")])


def test_cases_are_compared_by_their_sizes_and_what_is_in_one_file_is_named(tmp_path, capsys):
    def case(name, shape, seconds, **more):
        time = {"median": seconds[7], "calls": 15, "seconds": seconds}
        return {
            "op": "ssd",
            "name": name,
            "threads": 1,
            "shape": shape,
            "rows": [{"impl": "ours", "mode": "fwd", "time": time}],
            **more,
        }

    fast, slow = [1 + 0.001 * i for i in range(15)], [2 + 0.001 * i for i in range(15)]
    first = [case("a", {"length": 8}, fast), case("b", {"length": 9}, fast), case("gone", {"length": 7}, fast)]
    first.append(case("c", {"length": 8}, fast, chunk_size=16))
    then = [
        case("b2", {"length": 9}, fast),
        case("a", {"length": 8}, slow),
        case("c", {"length": 8}, fast, chunk_size=32),
    ]
    before = written(tmp_path / "a.json", [1.0], cases=first)
    after = written(tmp_path / "b.json", [1.0], cases=then)
    rows = compare(before, after)
    assert {row.case: round(row.ratio, 1) for row in rows} == {"ssd a": 2.0, "ssd b2": 1.0}
    assert [row.case for row in regressions(rows, 0.05, 0.01)] == ["ssd a"]
    assert unmatched(before, after) == [
        f"only in {before}: ssd gone ours fwd, ssd c ours fwd", f"only in {after}: ssd c ours fwd"
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main(["compare", str(before), str(after)])
    assert f"only in {before}: ssd gone ours fwd" in capsys.readouterr().out


def test_processor_times_are_compared_where_there_is_one_thread(tmp_path):
    def rows(seconds, processor):
        time = {"median": seconds[7], "calls": 15, "seconds": seconds, "processor_seconds": processor}
        return [{"impl": "ours", "mode": "fwd", "time": time}]

    fast, slow = ([n + 0.001 * i for i in range(15)] for n in (1, 2))
    for threads, ratio in ((1, 1.0), (2, 2.0)):
        before = written(tmp_path / "a.json", [1.0], rows=rows(fast, fast), threads=threads)
        after = written(tmp_path / "b.json", [1.0], rows=rows(slow, fast), threads=threads)
        assert [round(row.ratio, 1) for row in compare(before, after)] == [ratio]


def test_a_run_compares_with_itself(tmp_path):
    command = ["run", "ssd", "ssd_step", "--impl", "ours", "--shape", "tiny", "--mode", "fwd", "--metric", "time"]
    for name in ("a.json", "b.json"):
        cli.main([*command, "--batch", "1", "--calls", "3", "--out", str(tmp_path / name)])
    assert [row.case for row in compare(tmp_path / "a.json", tmp_path / "b.json")] == ["ssd tiny", "ssd_step tiny"]
