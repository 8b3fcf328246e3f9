"""Results of `ssm-bench run`, `sweep` and `integration`: tables, and the files of a report.

A report holds cases, one for each setting of the sizes, and a case a row for each mode and implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..model.text_files import read_json
from . import html, plots
from .files import write_report
from .other_work import NOTICED
from .tables import Row, as_html, as_markdown, as_text, milliseconds, percent, spread

COLUMNS = (
    "impl", "mode", "median", "low", "high", "processor", "calls", "scaling", "peak_memory", "truth", "error",
    "allowed_error", "gradient_error", "allowed_gradient_error", "is_right", "floor", "bound", "share", "other_cores",
    "missing",
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
    if old := next((case["name"] for case in report["cases"] if not {"op", "threads"} <= case.keys()), None):
        raise ValueError(f"{path} is not a report of this version's ssm-bench run: case {old} lacks op or threads")
    return report


def write_all(report: Report, path: Path) -> None:
    """Write the report as JSON and, beside it, as CSV and HTML and, where anything was timed, as PNG."""
    common = {key: report[key] for key in ("dtype", "device", "commit")}
    sizes = dict.fromkeys(name for case in report["cases"] for name in case["shape"])
    lines = [
        {**common, **case["shape"], **case, "case": case["name"], **row, **row.get("time", {})}
        for case, row in _rows(report)
    ]
    draw = plots.bars if report["over"] is None else plots.lines
    plot = (lambda: draw(report)) if any("time" in row for _, row in _rows(report)) else None
    columns = [*common, "op", "case", "threads", *sizes, "chunk_size", *COLUMNS]
    write_report(path, report, columns, lines, plot, lambda png: page(report, png))


def _rows(report: Report) -> list[tuple[Case, dict[str, Any]]]:
    """Each row with its case."""
    return [(case, row) for case in report["cases"] for row in case["rows"]]


HEADS = {
    "time": "ms", "spread": "quartiles", "processor": "processor ms", "ratio": "times", "scaling": "speed-up",
    "share": "of the limit", "memory": "peak MiB", "error": "error y", "gradient_error": "gradients",
}  # fmt: skip
"""Headings of the columns of numbers."""


def text(report: Report, case: Case) -> str:
    """A case's rows as text; ratios are to the first implementation that was timed in that mode."""
    heads, rows = _table([case])
    return f"{case['op']}, {report['dtype']}, {_sizes(case)}\n{as_text(heads, rows, names=(0, 1, 2))}\n"


def _table(cases: Sequence[Case]) -> tuple[list[str], list[Row]]:
    """Headings and rows; columns that are empty in all rows are left out."""
    pairs = [(case, row, _cells(case, row)) for case, row in _rows({"cases": cases})]
    shown = [key for key in HEADS if any(cells.get(key, "unknown") != "unknown" for _, _, cells in pairs)]
    rows: list[Row] = []
    before = None
    for case, row, cells in pairs:
        names = [f"{case['op']} {case['name']}", row["impl"], row["mode"]]
        group = (names[0], case["threads"], row["mode"])
        numbers = [] if "missing" in row else [cells.get(key, "") for key in shown]
        is_wrong = not row.get("is_right", True)
        rows.append(Row(names + numbers, row.get("missing", ""), before not in (None, group), is_wrong))
        before = group
    return ["case", "implementation", "mode", *(HEADS[key] for key in shown)], rows


def _cells(case: Case, row: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the measurements in a row."""
    cells = {}
    if "time" in row:
        t = row["time"]
        bound = f" ({row['bound']})" if row["bound"] else ""
        share = "unknown" if row["share"] is None else percent(row["share"]) + bound
        cells = {"time": milliseconds(t["median"]), "spread": spread(t), "share": share}
        if t.get("processor") is not None:
            cells["processor"] = milliseconds(t["processor"])
        cells["ratio"] = f"{_ratio(case, row):.2f}"
        if "scaling" in row:
            cells["scaling"] = f"{row['scaling']:.2f}"
    if "peak_memory" in row:
        cells["memory"] = f"{row['peak_memory'] / 2**20:.1f}"
    cells |= {key: f"{row[key]:.1e}" for key in ("error", "gradient_error") if key in row}
    if not row.get("is_right", True):
        cells["error" if row["error"] > case["allowed_error"] else "gradient_error"] += " WRONG"
    return cells


def markdown(report: Report) -> str:
    """A table for a documentation page, under the machine's name: a row for each case and implementation.

    Times are `decisive` ones, and the share of the limit is behind them.
    """
    modes = list(dict.fromkeys(row["mode"] for _, row in _rows(report)))
    has_scaling = any("scaling" in row for _, row in _rows(report))
    has_memory = any("peak_memory" in row for _, row in _rows(report))
    is_over_length = report["over"] == "length"
    heads = ["", "", *(f"{mode}, ms" for mode in modes)]
    heads += ["µs a step"] * is_over_length + ["speed-up"] * has_scaling + ["peak MiB"] * has_memory
    lines, before = [], None
    for case in report["cases"]:
        name = f"{case['op']} {case['name']}" if case["name"] != "default" else case["op"]
        name += f", {case['threads']} threads" * (case["threads"] > 1)
        for impl in dict.fromkeys(row["impl"] for row in case["rows"]):
            rows = {row["mode"]: row for row in case["rows"] if row["impl"] == impl}
            last = rows[[mode for mode in modes if mode in rows][-1]]
            cells = [name if name != before else "", impl, *(_time_and_share(case, rows.get(m, {})) for m in modes)]
            if is_over_length:
                steps = case["shape"]["batch"] * case["shape"]["length"]
                cells.append(f"{1e6 * decisive(last['time'], case['threads']) / steps:.2f}" if "time" in last else "")
            if has_scaling:
                cells.append(", ".join(f"{row['scaling']:.2f}" for row in rows.values() if "scaling" in row))
            if has_memory:
                cells.append(f"{last['peak_memory'] / 2**20:,.1f}" if "peak_memory" in last else "")
            lines.append(Row(cells))
            before = name
    others = max((row.get("other_cores") or 0.0 for _, row in _rows(report)), default=0.0)
    busy = f"; other work took up to {others:.1f} of {report['cores']} cores" * (others >= NOTICED)
    made = f"{report['device']}, commit {report['commit']}, {report['date'][:10]}{busy}."
    limits = "".join(f" {limit}." for limit in report.get("limits", {}).values())
    return f"{made}{limits}\n\n{as_markdown(heads, lines, names=(0, 1))}"


def _time_and_share(case: Case, row: Mapping[str, Any]) -> str:
    """A cell: milliseconds, the share of the limit, and behind the first implementation how many times its time."""
    if "time" not in row:
        return "over the budget" if row.get("missing", "").startswith("left out") else row.get("missing", "")
    notes = [] if row["share"] is None else [f"{percent(row['share'])} of {row['bound']}"]
    notes += [] if row["time"] is _first(case, row["mode"]) else [f"{_ratio(case, row):.1f}×"]
    text = milliseconds(decisive(row["time"], case["threads"])) + f" ({', '.join(notes)})" * bool(notes)
    return text + " WRONG" * (not row.get("is_right", True))


def _first(case: Case, mode: str) -> Mapping[str, Any]:
    """Times of the first implementation that was timed in a mode."""
    return next(row["time"] for row in case["rows"] if row["mode"] == mode and "time" in row)


def _ratio(case: Case, row: Mapping[str, Any]) -> float:
    """A row's time over that of the first implementation in its mode."""
    mine, first = (decisive(t, case["threads"]) for t in (row["time"], _first(case, row["mode"])))
    return mine / first if first else float("nan")


def decisive(time: Mapping[str, Any], threads: int) -> float:
    """Seconds that ratios and shares are taken of: with one thread its processor time, else the time by the clock."""
    has_processor = threads == 1 and time.get("processor") is not None
    return time["processor"] if has_processor else time["median"]


def _sizes(case: Case) -> str:
    chunk_size = {"chunk_size": case["chunk_size"]} if "chunk_size" in case else {}
    sizes = [f"{name} {value:,}" for name, value in (case["shape"] | chunk_size).items()]
    threads = "1 thread" if case["threads"] == 1 else f"{case['threads']} threads"
    return f"{case['name']}: {', '.join(sizes)}; {threads}"


TRUTHS = {
    "reference": "; y against the step-by-step reference",
    "torch": "; y against the torch backend, the reference taking too long",
    "transformers": "; differences of logits and gradients from transformers' own, in the same dtype",
}
"""Ground truth of the errors of a case, by its name in a report."""
NOTES = (
    "ms: medians of calls in turn, so that a drift of the machine affects all alike; processor ms: of all threads, "
    "which other work on the machine lengthens least. Times: relative to the first implementation that was timed; with "
    "one thread of processor times. Speed-up: over the first number of threads. Of the limit: share of the speed that "
    "the rates of the device, or of the cores as measured before, allow, and which of them binds. Errors are the "
    "largest, relative to the largest value, against float64 on the same inputs; those of gradients against the torch "
    "backend. A result that is wrong is marked, and its time means nothing."
)


def page(report: Report, png: bytes) -> str:
    """One HTML page with the table, the plot and the environment; `png` is empty without matplotlib."""
    body = as_html(*_table(report["cases"]), names=(0, 1, 2))
    body += "".join(html.quiet(_sizes(case) + TRUTHS.get(case.get("truth", ""), "")) for case in report["cases"])
    body += html.quiet(f"{NOTES} ours: the {report['ours']} backend, which backend=auto takes here.")
    return html.page(f"{report['op']}, {report['dtype']}", report, png, body)
