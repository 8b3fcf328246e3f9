"""Results of `ssm-bench run`, `sweep` and `integration`: text table, JSON, CSV, plots as PNG, and a page as HTML.

A report holds cases, one for each setting of the sizes, and a case a row for each mode and implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.files import write_atomic
from ..model.text_files import read_json
from . import html, plots
from .files import write_csv, write_json
from .plots import milliseconds

COLUMNS = (
    "impl", "mode", "median", "low", "high", "calls", "peak_memory", "truth", "error", "allowed_error",
    "gradient_error", "allowed_gradient_error", "is_right", "floor", "bound", "share", "missing",
)  # fmt: skip
"""Columns of the CSV, after those of the case; seconds and bytes."""
Report = Mapping[str, Any]
Case = Mapping[str, Any]


def read(path: Path) -> dict[str, Any]:
    """Read a report of `ssm-bench run` or `sweep`.

    Raises:
        ValueError: the file is none.
    """
    report = read_json(path)
    if not isinstance(report, dict) or not {"op", "cases", "device"} <= report.keys():
        raise ValueError(f"{path} is not a report of this version's ssm-bench run: it lacks op, cases or device")
    return report


def write_all(report: Report, path: Path) -> None:
    """Write the report as JSON and, beside it, as CSV and HTML and, where anything was timed, as PNG."""
    write_json(path, report)
    write_csv(path.with_suffix(".csv"), *_csv(report))
    pngs: list[bytes] = []
    if any("time" in row for _, row in _rows(report)):
        try:
            if report["over"] is None:
                write_atomic(path.with_suffix(".png"), plots.bars(report))
                pngs = [plots.bars({**report, "cases": [case]}) for case in report["cases"]]
            else:
                pngs = [plots.lines(report)]
                write_atomic(path.with_suffix(".png"), pngs[0])
        except ModuleNotFoundError as e:
            print(f"no plot: {e}")
    write_atomic(path.with_suffix(".html"), page(report, pngs))


def _rows(report: Report) -> list[tuple[Case, dict[str, Any]]]:
    """Each row with its case."""
    return [(case, row) for case in report["cases"] for row in case["rows"]]


def _csv(report: Report) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and lines: one for each row, after the case and the device."""
    common = {key: report[key] for key in ("op", "dtype", "device", "commit")}
    sizes = dict.fromkeys(name for case in report["cases"] for name in case["shape"])
    lines = [
        {**common, **case["shape"], **case, "case": case["name"], **row, **row.get("time", {})}
        for case, row in _rows(report)
    ]
    return [*common, "case", *sizes, "chunk_size", *COLUMNS], lines


CELLS = {
    "time": ("ms", 12), "spread": ("quartiles", 24), "ratio": ("times", 9), "share": ("roofline", 10),
    "memory": ("peak MiB", 10), "error": ("error y", 10), "gradient_error": ("gradients", 11),
}  # fmt: skip
"""Columns of a table: heading, and width as text."""


def table(report: Report, case: Case) -> str:
    """A case's rows as text; ratios are to the first implementation that was timed in that mode."""
    lines = [f"{report['op']}, {report['dtype']}, {case['name']}: {_sizes(case)}"]
    lines.append(" " * 22 + "".join(f"{head:>{width}}" for head, width in CELLS.values()))
    for row in case["rows"]:
        line = f"{row['impl']:<14}{row['mode']:<8}"
        if "missing" in row:
            lines.append(f"{line}    {row['missing']}")
            continue
        cells = _cells(row, _first_time(case, row["mode"]))
        line += "".join(f"{cells[key]:>{width}}" for key, (_, width) in CELLS.items())
        lines.append(line.rstrip() + "  WRONG" * (not row.get("is_right", True)))
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], first: float | None) -> dict[str, str]:
    cells = dict.fromkeys(CELLS, "")
    if "time" in row:
        t = row["time"]
        cells["time"] = milliseconds(t["median"])
        cells["spread"] = spread(t)
        cells["ratio"] = f"{t['median'] / first:.2f}" if first else ""
        cells["share"] = "unknown" if row["share"] is None else f"{row['share']:.0%}"
    if "peak_memory" in row:
        cells["memory"] = f"{row['peak_memory'] / 2**20:.1f}"
    for key in ("error", "gradient_error"):
        if key in row:
            cells[key] = f"{row[key]:.1e}"
    return cells


def spread(time: Mapping[str, Any]) -> str:
    """Quartiles of a time in milliseconds."""
    return f"{milliseconds(time['low'])} to {milliseconds(time['high'])}" if time["calls"] > 1 else "one call"


def _first_time(case: Case, mode: str) -> float | None:
    timed = (row["time"]["median"] for row in case["rows"] if row["mode"] == mode and "time" in row)
    return next(timed, None)


def _sizes(case: Case) -> str:
    sizes = [f"{name} {value:,}" for name, value in case["shape"].items()]
    return ", ".join(sizes + ([f"chunk_size {case['chunk_size']}"] if "chunk_size" in case else []))


def page(report: Report, pngs: Sequence[bytes]) -> str:
    """One HTML page with tables, plots and the environment.

    Args:
        pngs: a plot for each case, or one of a sweep; empty without matplotlib.
    """
    sections = _sweep(report, pngs) if report["over"] else _sections(report, pngs)
    return html.page(f"{report['op']}, {report['dtype']}", report, sections + html.quiet(_notes(report)))


def _sections(report: Report, pngs: Sequence[bytes]) -> str:
    text = ""
    for i, case in enumerate(report["cases"]):
        text += f"<h2>{html.escape(case['name'])}</h2>\n{html.quiet(_sizes(case))}"
        text += _html_table([("", case, row) for case, row in _rows({"cases": [case]})])
        text += html.image(pngs[i], "median times with quartiles") if pngs else ""
    return text


def _sweep(report: Report, pngs: Sequence[bytes]) -> str:
    over = report["over"]
    fixed = [f"{k} {v:,}" for k, v in report["cases"][0]["shape"].items() if k != over]
    text = f"<h2>Against {html.escape(over)}</h2>\n{html.quiet(', '.join(fixed))}"
    text += "".join(html.image(plot, f"time against {over}, logarithmic") for plot in pngs)
    measured = {row["impl"] for _, row in _rows(report) if "missing" not in row}
    absent = {row["impl"]: row["missing"] for _, row in _rows(report) if row["impl"] not in measured}
    modes = [row["mode"] for row in report["cases"][0]["rows"]]
    rows = [(case, row) for case, row in _rows(report) if row["impl"] in measured]
    rows.sort(key=lambda pair: modes.index(pair[1]["mode"]))
    text += _html_table([(f"{case['value']:,}", case, row) for case, row in rows], over)
    return text + "".join(html.quiet(f"{impl}: {why}") for impl, why in absent.items())


def _html_table(rows: Sequence[tuple[str, Case, dict[str, Any]]], over: str = "") -> str:
    """A table of rows, each with the value of the size that is swept; columns that are empty in all are left out."""
    texts = [_cells(row, _first_time(case, row["mode"])) for _, case, row in rows]
    shown = {key: head for key, (head, _) in CELLS.items() if any(t[key] not in ("", "unknown") for t in texts)}
    found, before = [], None
    for (value, case, row), cells in zip(rows, texts, strict=True):
        is_right = row.get("is_right", True)
        cells["share"] += f" ({row['bound']})" if row.get("bound") else ""
        wrong = "error" if row.get("error", 0) > case.get("allowed_error", 0) else "gradient_error"
        cells[wrong] += "" if is_right else " WRONG"
        missing = row.get("missing", "")
        names = [value] * bool(over) + [row["impl"], row["mode"]]
        numbers = [] if missing else [cells[key] for key in shown]
        found.append(html.Row(names + numbers, missing, before not in (None, row["mode"]), not is_right))
        before = row["mode"]
    heads = [over] * bool(over) + ["implementation", "mode", *shown.values()]
    return html.table(heads, found, names=(1, 2) if over else (0, 1))


def _notes(report: Report) -> str:
    """The meaning of the columns."""
    rows = [row for _, row in _rows(report)]
    notes = []
    if any("time" in row for row in rows):
        notes.append(
            "ms: medians of calls in turn, so that a drift of the machine affects all alike; times: relative to the "
            "first implementation that was timed."
        )
        if all(row["share"] is None for row in rows if "time" in row):
            notes.append("No roofline: the peak rates of this device are not known, or the op is a complete block.")
        else:
            notes.append("Roofline: the share of the speed that the device's peak rates allow, and the bound.")
    if any(row["impl"] == "ours" for row in rows):
        notes.append(f"ours: the {report['ours']} backend, which backend=auto takes here.")
    if any("error" in row for row in rows):
        notes.append(_note_on_errors(report["cases"]))
    return " ".join(notes)


def _note_on_errors(cases: Sequence[Case]) -> str:
    wrong = "A result that is wrong is marked, and its time means nothing."
    if any(case.get("truth") == "transformers" for case in cases):
        return (
            "Errors are the largest differences of logits and gradients from transformers' own, in the same dtype, "
            f"relative to the largest value. {wrong}"
        )
    by_torch = [case["name"] for case in cases if case.get("truth") == "torch"]
    if len(by_torch) == len(cases):
        y = "the torch backend, the reference taking too long"
    elif by_torch:
        y = f"the step-by-step reference ({', '.join(by_torch)}: the torch backend, the reference taking too long)"
    else:
        y = "the step-by-step reference"
    return (
        "Errors are the largest, relative to the largest value, against float64 on the same inputs: of y against "
        f"{y}; of gradients against the torch backend. {wrong}"
    )
