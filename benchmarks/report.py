"""What `ssm-bench run` and `sweep` write: JSON, CSV, plots as PNG, and one HTML file that opens offline.

The HTML asks for nothing from anywhere: plots are inside of it, its style is, and it has no script.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from pathlib import Path

COLUMNS = (
    "impl", "mode", "median", "low", "high", "calls", "peak_memory", "error", "is_right", "floor", "bound", "share",
    "missing",
)  # fmt: skip
"""Of the CSV, after those of the case; seconds and bytes."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .8em; text-align: right }
th { border-bottom: 2px solid #999 } td { border-bottom: 1px solid #ddd } .name { text-align: left }
.wrong { background: #fdd; font-weight: bold } .missing { color: #777; text-align: left } img { max-width: 100% }
"""


def read(path: Path) -> dict:
    """A report of `ssm-bench run`.

    Raises:
        ValueError: the file is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON: {e}") from e
    if not isinstance(report, dict) or not {"op", "rows", "device"} <= report.keys():
        raise ValueError(f"{path} is not a report of ssm-bench run: it lacks op, rows or device")
    return report


def write_json(path: Path | None, result: dict) -> None:
    """The result where a path was asked for, with the folders on the way to it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {path}")


def to_csv(report: dict, path: Path) -> None:
    """A line for each row, with the case and the device in front."""
    case = {"op": report["op"], "dtype": report["dtype"], **report["shape"], "device": report["device"]}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*case, *COLUMNS], extrasaction="ignore")
        writer.writeheader()
        for row in report["rows"]:
            writer.writerow({**case, **row, **row.get("time", {})})


def bars(report: dict) -> bytes:
    """Medians with quartiles of every implementation, a panel for each mode, as PNG; the roofline as a line."""
    plt = _pyplot()
    modes = list(dict.fromkeys(row["mode"] for row in report["rows"]))
    figure, axes = plt.subplots(1, len(modes), figsize=(4.2 * len(modes), 3.4), squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        rows = [row for row in report["rows"] if row["mode"] == mode and "time" in row]
        for i, row in enumerate(rows):
            t = row["time"]
            color = "tab:blue" if row.get("is_right", True) else "tab:red"
            spread = [[1e3 * (t["median"] - t["low"])], [1e3 * (t["high"] - t["median"])]]
            axis.bar(i, 1e3 * t["median"], yerr=spread, color=color, capsize=4)
            mark = "" if row.get("is_right", True) else "\nwrong"
            axis.annotate(f"{1e3 * t['median']:.3g}{mark}", (i, 1e3 * t["high"]), ha="center", va="bottom")
        floors = [row["floor"] for row in rows if row.get("floor")]
        if floors:
            axis.axhline(1e3 * floors[0], color="black", linestyle=":", label="roofline")
            axis.legend()
        axis.margins(y=0.2)
        axis.set(title=mode, ylabel="ms", xticks=range(len(rows)))
        axis.set_xticklabels([row["impl"] for row in rows], rotation=20)
    return _png(figure, f"{report['op']}, {report['dtype']}, {report['device']}")


def against(report: dict) -> bytes:
    """A sweep's times on logarithmic axes, as PNG, with the roofline, and, over lengths, what is proportional."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 4))
    values = report["values"]
    for impl, seconds in report["seconds"].items():
        axis.loglog(values, seconds, "o-", label=impl)
        if report["over"] == "length":
            axis.loglog(values, [seconds[0] * n / values[0] for n in values], "k:", linewidth=1)
    if report["floors"]:
        axis.loglog(values, report["floors"], "k--", label="roofline")
    axis.set(xlabel=report["over"], ylabel="seconds")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    fixed = [f"{name} {report[name]}" for name in ("batch", "length") if name != report["over"]]
    return _png(figure, ", ".join([report["op"], report["mode"], *fixed]))


def to_html(report: dict, plot: bytes | None, path: Path) -> None:
    """One file with everything: the table, the plot, the environment."""
    sizes = ", ".join(f"{name} {value}" for name, value in report["shape"].items())
    packages = {name: version or "not installed" for name, version in report["packages"].items()}
    facts = {k: report[k] for k in ("device", "driver", "threads", "cores", "python", "commit")} | packages
    body = "".join(_html_row(row) for row in report["rows"])
    environment = "".join(
        f'<tr><td class="name">{_e(k)}</td><td class="name">{_e(v)}</td></tr>' for k, v in facts.items()
    )
    title = f"{report['op']}, {report['dtype']}"
    heads = "".join(f"<th>{h}</th>" for h in ("ms", "quartiles", "calls", "roofline", "peak MiB", "error"))
    picture = "" if plot is None else f"data:image/png;base64,{base64.b64encode(plot).decode()}"
    picture = picture and f'<img alt="median times with quartiles" src="{picture}">\n'
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_e(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>\n'
        f"<h1>{_e(title)}</h1>\n<p>{_e(sizes)}</p>\n"
        f'<table><tr><th class="name">implementation</th><th class="name">mode</th>{heads}</tr>\n{body}</table>\n'
        f"<p>Error: the largest, forward, against the step-by-step reference in float64, as a share of the largest "
        f"value. What is wrong is marked: its time says nothing.</p>\n"
        f"{picture}<h2>Environment</h2>\n<table>{environment}</table>\n</body></html>\n",
        encoding="utf-8",
    )


def _html_row(row: dict) -> str:
    names = f'<td class="name">{_e(row["impl"])}</td><td class="name">{_e(row["mode"])}</td>'
    if "missing" in row:
        return f'<tr>{names}<td class="missing" colspan="6">{_e(row["missing"])}</td></tr>\n'
    cells = [""] * 6
    if "time" in row:
        t = row["time"]
        cells[:3] = f"{1e3 * t['median']:.3f}", f"{1e3 * t['low']:.3f} to {1e3 * t['high']:.3f}", str(t["calls"])
        cells[3] = "unknown" if row["share"] is None else f"{row['share']:.0%} ({row['bound']})"
    if "peak_memory" in row:
        cells[4] = f"{row['peak_memory'] / 2**20:.1f}"
    if "error" in row:
        cells[5] = f"{row['error']:.1e}" + (" WRONG" if not row["is_right"] else "")
    kind = "" if row.get("is_right", True) else ' class="wrong"'
    return f"<tr{kind}>{names}" + "".join(f"<td>{_e(cell)}</td>" for cell in cells) + "</tr>\n"


def _e(value: object) -> str:
    return html.escape(str(value))


def _pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _png(figure, title: str) -> bytes:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    _pyplot().close(figure)
    return buffer.getvalue()
