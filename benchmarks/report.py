"""What `ssm-bench run` and `sweep` write: JSON, CSV, plots as PNG, and one HTML file that opens offline.

A report holds cases, one for each setting of the sizes, and a case a row for each mode and implementation. The HTML
asks for nothing from anywhere: plots are inside of it, its style is, and it has no script.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from ..model.files import write_whole, writing_whole
from ..model.text_files import read_json

COLUMNS = (
    "impl", "mode", "median", "low", "high", "calls", "peak_memory", "truth", "error", "allowed_error",
    "gradient_error", "allowed_gradient_error", "is_right", "floor", "bound", "share", "missing",
)  # fmt: skip
"""Of the CSV, after those of the case; seconds and bytes."""
FACTS = ("device", "driver", "threads", "cores", "python", "commit", "date")
"""Of the environment, beside the packages."""
COLORS = {
    "ours": "#1f5fa8", "torch": "#5fa2dd", "triton": "#123a66", "reference": "#888888", "mamba_ssm": "#d9822b",
    "causal_conv1d": "#a0522d", "fla": "#7b4fa3", "transformers": "#c9a227",
}  # fmt: skip
WRONG = "#c62828"
LOG = 30
"""Where times differ by more than this factor, their axis is logarithmic."""

STYLE = """
body { font: 14px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #1c1e21;
  max-width: 64em; margin: 2.5em auto; padding: 0 1.5em }
h1 { font-size: 1.6em; margin: 0 } h2 { font-size: 1.15em; margin: 2.2em 0 .2em; border-bottom: 1px solid #ddd }
p { margin: .4em 0 } code { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; background: #f3f4f6;
  padding: .15em .4em; border-radius: 3px } .quiet { color: #666; font-size: .92em }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
th, td { padding: .28em .8em; text-align: right; white-space: nowrap } th { font-weight: 600; color: #555 }
thead th { border-bottom: 1.5px solid #888 } td { border-bottom: 1px solid #eee }
tr.first td { border-top: 2px solid #bbb } .name { text-align: left } td.missing { color: #777; text-align: left;
  white-space: normal } tr.wrong td { background: #fde8e8; color: #a31515; font-weight: 600 }
img { max-width: 100%; height: auto; display: block; margin: .6em 0 }
"""


def write_json(path: Path | None, result: dict) -> None:
    """The result where a path was asked for, with the folders on the way to it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result, indent=2) + "\n")
        print(f"wrote {path}")


def read(path: Path) -> dict:
    """A report of `ssm-bench run` or `sweep`.

    Raises:
        ValueError: the file is none.
    """
    report = read_json(path)
    if not isinstance(report, dict) or not {"op", "cases", "device"} <= report.keys():
        raise ValueError(f"{path} is not a report of this version's ssm-bench run: it lacks op, cases or device")
    return report


def write_all(report: dict, path: Path) -> None:
    """The report as JSON at the path and, beside it, as CSV and HTML and, where anything was timed, as PNG."""
    write_json(path, report)
    to_csv(report, path.with_suffix(".csv"))
    plots: list[bytes] = []
    if any("time" in row for case in report["cases"] for row in case["rows"]):
        try:
            if report["over"] is None:
                write_whole(path.with_suffix(".png"), bars(report))
                plots = [bars(report | {"cases": [case]}) for case in report["cases"]]
            else:
                plots = [lines(report)]
                write_whole(path.with_suffix(".png"), plots[0])
        except ModuleNotFoundError as e:
            print(f"no plot: {e}")
    to_html(report, plots, path.with_suffix(".html"))


def table(report: dict, case: dict) -> str:
    """A case's rows as lines of text; ratios are against the first implementation that was timed in that mode."""
    lines = [f"{report['op']}, {report['dtype']}, {_title(case)}"]
    lines.append(" " * 22 + "".join(f"{head:>{width}}" for head, width in CELLS.values()))
    for row in case["rows"]:
        line = f"{row['impl']:<14}{row['mode']:<8}"
        if "missing" in row:
            lines.append(f"{line}    {row['missing']}")
            continue
        cells = _cells(row, _first(case, row["mode"]))
        line += "".join(f"{cells[key]:>{width}}" for key, (_, width) in CELLS.items())
        lines.append(line.rstrip() + "  WRONG" * (not row.get("is_right", True)))
    return "\n".join(lines)


CELLS = {
    "time": ("ms", 12), "spread": ("quartiles", 24), "ratio": ("times", 9), "share": ("roofline", 10),
    "memory": ("peak MiB", 10), "error": ("error y", 10), "gradient_error": ("gradients", 11),
}  # fmt: skip
"""What a row shows: its heading, and its width as text."""


def _cells(row: dict, first: float | None) -> dict[str, str]:
    cells = dict.fromkeys(CELLS, "")
    if "time" in row:
        t = row["time"]
        cells["time"] = milliseconds(t["median"])
        cells["spread"] = f"{milliseconds(t['low'])} to {milliseconds(t['high'])}" if t["calls"] > 1 else "one call"
        cells["ratio"] = f"{t['median'] / first:.2f}" if first else ""
        cells["share"] = "unknown" if row["share"] is None else f"{row['share']:.0%}"
    if "peak_memory" in row:
        cells["memory"] = f"{row['peak_memory'] / 2**20:.1f}"
    for key in ("error", "gradient_error"):
        if key in row:
            cells[key] = f"{row[key]:.1e}"
    return cells


def milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 10 else f"{ms:.3f}"


def _first(case: dict, mode: str) -> float | None:
    timed = (row["time"]["median"] for row in case["rows"] if row["mode"] == mode and "time" in row)
    return next(timed, None)


def _title(case: dict) -> str:
    sizes = [f"{name} {value:,}" for name, value in case["shape"].items()]
    sizes += [f"chunk_size {case['chunk_size']}"] if "chunk_size" in case else []
    return f"{case['name']}: {', '.join(sizes)}"


def to_csv(report: dict, path: Path) -> None:
    """A line for each row, with the case and the device in front."""
    every = {"op": report["op"], "dtype": report["dtype"], "device": report["device"], "commit": report["commit"]}
    with writing_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        sizes = dict.fromkeys(name for case in report["cases"] for name in case["shape"])
        columns = [*every, "case", *sizes, "chunk_size", *COLUMNS]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for case in report["cases"]:
            for row in case["rows"]:
                writer.writerow({**every, **case["shape"], **case, "case": case["name"], **row, **row.get("time", {})})


def bars(report: dict) -> bytes:
    """Medians with quartiles of every implementation as PNG, a panel for each case and mode; the roofline as a line."""
    plt = pyplot_headless()
    cases = report["cases"]
    modes = list(dict.fromkeys(row["mode"] for row in cases[0]["rows"]))
    impls = list(dict.fromkeys(row["impl"] for row in cases[0]["rows"]))
    size = (max(4.2, min(10.5, 4.2 * len(modes) + 1)), (0.34 * len(impls) + 1.05) * len(cases) + 0.3)
    figure, axes = plt.subplots(len(cases), len(modes), figsize=size, squeeze=False, sharey=True)
    for case, panels in zip(cases, axes, strict=True):
        for mode, axis in zip(modes, panels, strict=True):
            rows = [row for row in case["rows"] if row["mode"] == mode]
            title = f"{case['name']}, {mode}" if len(cases) > 1 else mode
            _bars(axis, rows, title)
    return png(figure, f"{report['op']}, {report['dtype']}, {report['device']}")


def _bars(axis, rows: Sequence[dict], title: str) -> None:
    ends = [1e3 * row["time"]["high"] for row in rows if "time" in row]
    least = [1e3 * row["time"]["median"] for row in rows if "time" in row]
    floors = [1e3 * row["floor"] for row in rows if row.get("floor")]
    is_log = bool(ends) and max(ends) > LOG * min(least + floors)
    if is_log:
        axis.set_xscale("log")
        axis.set_xlim(min(least + floors) / 3, 12 * max(ends))
    elif ends:
        axis.set_xlim(0, 1.45 * max(ends))
    for i, row in enumerate(rows):
        if "time" not in row:
            why = "not installed" if "not installed" in row.get("missing", "") else "not measured"
            x = axis.get_xlim()[0]
            axis.annotate(why, (x, i), (4, 0), textcoords="offset points", va="center", color="#888888", fontsize=8)
            continue
        low, median, high = (1e3 * row["time"][key] for key in ("low", "median", "high"))
        is_right = row.get("is_right", True)
        color = COLORS.get(row["impl"], "#444444") if is_right else WRONG
        spread = [[median - low], [high - median]]
        axis.barh(i, median, xerr=spread, color=color, height=0.62, capsize=3, ecolor="#222222")
        label = f"{milliseconds(median / 1e3)} ms" + ("" if is_right else "  wrong")
        axis.annotate(label, (high, i), (5, 0), textcoords="offset points", va="center", fontsize=8)
    if floors:
        axis.axvline(floors[0], color="black", linestyle=":", label="roofline")
        axis.legend(fontsize=8, loc="lower right")
    axis.set_yticks(range(len(rows)), [row["impl"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("ms, logarithmic" if is_log else "ms", fontsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    plain_ticks(axis)


def lines(report: dict) -> bytes:
    """A sweep's medians on logarithmic axes, as PNG, quartiles as bands, with the roofline; a panel for each mode.

    Over lengths and batches a dotted line shows what would be in proportion to the first.
    """
    plt = pyplot_headless()
    modes = list(dict.fromkeys(row["mode"] for row in report["cases"][0]["rows"]))
    impls = list(dict.fromkeys(row["impl"] for row in report["cases"][0]["rows"]))
    size = (max(5.6, min(10.5, 5.2 * len(modes))), 4.2)
    figure, axes = plt.subplots(1, len(modes), figsize=size, squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        rows = [(case["value"], r) for case in report["cases"] for r in case["rows"] if r["mode"] == mode]
        for impl in impls:
            timed = [(value, row) for value, row in rows if row["impl"] == impl and "time" in row]
            if not timed:
                axis.plot([], [], color="#bbbbbb", label=f"{impl}: {_why(rows, impl)}")
                continue
            _line(axis, impl, timed, is_proportional=report["over"] in ("length", "batch"))
        floors = [(value, row["floor"]) for value, row in rows if row.get("floor")]
        if floors:
            axis.plot(*zip(*sorted(set(floors)), strict=True), "k--", linewidth=1.2, label="roofline")
        values = [case["value"] for case in report["cases"]]
        axis.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
        axis.minorticks_off()
        axis.set_xlabel(report["over"])
        axis.set_ylabel("seconds")
        axis.set_title(mode, fontsize=9, loc="left")
        axis.grid(alpha=0.25, which="major")
        axis.legend(fontsize=8, frameon=False)
        plain_ticks(axis)
    fixed = [f"{k} {v:,}" for k, v in report["cases"][0]["shape"].items() if k != report["over"]]
    return png(figure, f"{report['op']}, {report['dtype']}, {report['device']}\n{', '.join(fixed)}")


def _line(axis, impl: str, timed: Sequence[tuple[int, dict]], *, is_proportional: bool) -> None:
    values = [value for value, _ in timed]
    low, median, high = ([row["time"][key] for _, row in timed] for key in ("low", "median", "high"))
    color = COLORS.get(impl, "#444444")
    axis.plot(values, median, "o-", color=color, markersize=4, label=impl)
    axis.fill_between(values, low, high, color=color, alpha=0.25, linewidth=0)
    if is_proportional and len(values) > 1:
        proportional = [median[0] * n / values[0] for n in values]
        axis.plot(values, proportional, ":", color=color, linewidth=1, label=f"{impl}, in proportion to the first")
    wrong = [(value, row["time"]["median"]) for value, row in timed if not row.get("is_right", True)]
    if wrong:
        axis.plot(*zip(*wrong, strict=True), "X", color=WRONG, markersize=9, label=f"{impl}: wrong")


def _why(rows: Sequence[tuple[int, dict]], impl: str) -> str:
    is_installed = not any("not installed" in row.get("missing", "") for _, row in rows if row["impl"] == impl)
    return "not measured" if is_installed else "not installed"


def to_html(report: dict, plots: Sequence[bytes], path: Path) -> None:
    """One file with everything: tables, plots, the environment. `plots` are one a case, or one of a sweep."""
    title = f"{report['op']}, {report['dtype']}"
    packages = {name: version or "not installed" for name, version in report["packages"].items()}
    facts = {key: report[key] for key in FACTS if report[key] is not None} | packages
    environment = "".join(
        f'<tr><td class="name">{escape(k)}</td><td class="name">{escape(v)}</td></tr>' for k, v in facts.items()
    )
    sections = _sweep(report, plots) if report["over"] else _sections(report, plots)
    write_whole(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>\n'
        f'<h1>{escape(title)}</h1>\n<p class="quiet">{escape(report["device"])}, commit {escape(report["commit"])}, '
        f"{escape(report['date'])}</p>\n<p><code>{escape(report['command'])}</code></p>\n"
        f"{sections}{_notes(report)}<h2>Environment</h2>\n<table>{environment}</table>\n</body></html>\n",
    )


def _sections(report: dict, plots: Sequence[bytes]) -> str:
    text = ""
    for i, case in enumerate(report["cases"]):
        name, sizes = _title(case).split(": ", 1)
        text += f'<h2>{escape(name)}</h2>\n<p class="quiet">{escape(sizes)}</p>\n'
        text += _html_table([("", case, row) for row in case["rows"]])
        text += img(plots[i], "median times with quartiles") if plots else ""
    return text


def _sweep(report: dict, plots: Sequence[bytes]) -> str:
    fixed = [f"{k} {v:,}" for k, v in report["cases"][0]["shape"].items() if k != report["over"]]
    text = f'<h2>Against {escape(report["over"])}</h2>\n<p class="quiet">{escape(", ".join(fixed))}</p>\n'
    text += "".join(img(plot, f"time against {report['over']}, logarithmic") for plot in plots)
    absent = {row["impl"]: row["missing"] for _, row in _rows(report) if "missing" in row}
    for _, row in _rows(report):
        if "missing" not in row:
            absent.pop(row["impl"], None)
    rows = [(case, row) for case, row in _rows(report) if row["impl"] not in absent]
    modes = [row["mode"] for row in report["cases"][0]["rows"]]
    rows.sort(key=lambda pair: modes.index(pair[1]["mode"]))
    text += _html_table([(f"{case['value']:,}", case, row) for case, row in rows], report["over"])
    return text + "".join(f'<p class="quiet">{escape(impl)}: {escape(why)}</p>\n' for impl, why in absent.items())


def _rows(report: dict) -> list[tuple[dict, dict]]:
    """Each row with its case."""
    return [(case, row) for case in report["cases"] for row in case["rows"]]


def _html_table(rows: Sequence[tuple[str, dict, dict]], over: str = "") -> str:
    empty = ("", "unknown")
    cells = [_cells(row, 1.0) for _, _, row in rows]
    shown = {key: head for key, (head, _) in CELLS.items() if any(row[key] not in empty for row in cells)}
    heads = "".join(f"<th>{escape(head)}</th>" for head in shown.values())
    size = f"<th>{escape(over)}</th>" if over else ""
    body, before = "", None
    for value, case, row in rows:
        is_first = before not in (None, row["mode"])
        before = row["mode"]
        kinds = ["first"] * is_first + ["wrong"] * (not row.get("is_right", True))
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        names = (f"<td>{value}</td>" if over else "") + "".join(
            f'<td class="name">{escape(row[key])}</td>' for key in ("impl", "mode")
        )
        if "missing" in row:
            cells = f'<td class="missing" colspan="{max(1, len(shown))}">{escape(row["missing"])}</td>'
        else:
            found = _cells(row, _first(case, row["mode"]))
            found["share"] += f" ({row['bound']})" if row.get("bound") else ""
            wrong = "error" if row.get("error", 0) > case.get("allowed_error", 0) else "gradient_error"
            found[wrong] += " WRONG" if not row.get("is_right", True) else ""
            cells = "".join(f"<td>{escape(found[key])}</td>" for key in shown)
        body += f"<tr{kind}>{names}{cells}</tr>\n"
    return (
        f'<table><thead><tr>{size}<th class="name">implementation</th><th class="name">mode</th>{heads}</tr></thead>\n'
        f"<tbody>{body}</tbody></table>\n"
    )


def _notes(report: dict) -> str:
    """What the columns mean."""
    rows = [row for case in report["cases"] for row in case["rows"]]
    notes = []
    if any("time" in row for row in rows):
        notes.append(
            "ms: medians of calls in turn, so that a drift of the machine hits all alike; times: those of the first "
            "implementation that was timed."
        )
        if all(row["share"] is None for row in rows if "time" in row):
            notes.append("No roofline: the peak rates of this device are not known, or the op is a whole block.")
        else:
            notes.append("Roofline: the share of the speed that the device's peak rates allow, and what bounds it.")
    if any(row["impl"] == "ours" for row in rows):
        notes.append(f"ours: the {report['ours']} backend, which backend=auto takes here.")
    if any("error" in row for row in rows):
        notes.append(_held_against(report["cases"]))
    return f'<p class="quiet">{escape(" ".join(notes))}</p>\n'


def _held_against(cases: Sequence[dict]) -> str:
    wrong = "What is wrong is marked: its time says nothing."
    if any(case.get("truth") == "transformers" for case in cases):
        return (
            "Errors are the largest differences of logits and gradients from transformers' own, in the same dtype, as "
            f"a share of the largest value. {wrong}"
        )
    by_torch = [case["name"] for case in cases if case.get("truth") == "torch"]
    if len(by_torch) == len(cases):
        y = "the torch backend, the reference taking too long"
    elif by_torch:
        y = f"the step-by-step reference ({', '.join(by_torch)}: the torch backend, the reference taking too long)"
    else:
        y = "the step-by-step reference"
    return (
        "Errors are the largest, as a share of the largest value, against float64 on the same inputs: of y against "
        f"{y}; of gradients against the torch backend. {wrong}"
    )


def img(plot: bytes, alt: str) -> str:
    """A plot as an HTML element that holds it."""
    width = int.from_bytes(plot[16:20], "big") * 96 // DPI  # from the PNG's header
    return f'<img alt="{escape(alt)}" width="{width}" src="data:image/png;base64,{base64.b64encode(plot).decode()}">\n'


def escape(value: object) -> str:
    """A value as HTML text."""
    return html.escape(str(value))


DPI = 160


def pyplot_headless():
    """Matplotlib's pyplot, drawing to memory.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plain_ticks(axis) -> None:
    """Small labels, and no frame above and on the right."""
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def png(figure, title: str) -> bytes:
    """A figure under its title as PNG; it is closed."""
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    pyplot_headless().close(figure)
    return buffer.getvalue()
