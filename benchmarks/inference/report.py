"""Results of `ssm-bench prefill` and `decode`: tables, and the files of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ...train.plot_style import DASHES, INK, label_lines, line_styles, png, subplots
from .. import html, plots
from ..files import write_report
from ..tables import Row, as_html, as_text, milliseconds, spread
from .specs import SAME_SIZE, SPECS, spec_of

COLUMNS = {
    "prefill": ("median", "low", "high", "calls", "fastest", "encode", "tokens", "prompt_tokens_s", "state_bytes",
                "peak_memory"),
    "decode": ("median", "low", "high", "calls", "fastest", "tokens_s", "bandwidth_share", "state_bytes",
               "peak_memory"),
}  # fmt: skip
"""Columns of the CSV, after those that name the row; seconds and bytes."""
HEADS = {
    "prefill": ("LM", "first token ms", "quartiles", "fastest", "encoder ms", "tokens", "tokens/s", "state MiB",
                "peak MiB"),
    "decode": ("LM", "ms a step", "quartiles", "fastest", "tokens/s", "each", "of bandwidth", "state MiB", "peak MiB"),
}  # fmt: skip
"""Headings of a table, after context and model."""
Result = Mapping[str, Any]
Record = Mapping[str, Any]
"""A row of a result."""


def write_all(result: Result, path: Path) -> None:
    """Write JSON and, beside it, CSV, HTML and, with matplotlib, PNG."""
    common = {key: result[key] for key in ("phase", "size", "dtype", "device", "commit")}
    names = ("model", "lm_parameters", "parameters", "batch", "context")
    lines = []
    for row in result["rows"]:
        parts = _parameters(result, row)
        line = {"lm_parameters": parts.get("language"), "parameters": sum(parts.values()) or None}
        line |= {"is_right": result["checks"].get(row["model"], {}).get("is_right")}
        lines.append({**common, **row, **row.get("time", {}), **line, "encode": row.get("encode", {}).get("median")})
    columns = [*common, *names, *COLUMNS[result["phase"]], "in_prefill_chunks", "is_right", "missing"]
    draw = (lambda: plot(result)) if any("time" in row for row in result["rows"]) else None
    write_report(path, result, columns, lines, draw, lambda png: page(result, png))


def _parameters(result: Result, row: Record) -> dict[str, int]:
    return result["models"].get(row["model"], {}).get("parameters", {})


def _batches(result: Result) -> dict[int, list[Record]]:
    """Rows by batch, in the order of their contexts."""
    batches = sorted({row["batch"] for row in result["rows"]})
    in_order = sorted(result["rows"], key=lambda row: row["context"])
    return {batch: [row for row in in_order if row["batch"] == batch] for batch in batches}


def tables(result: Result) -> Iterator[tuple[str, list[str], list[Row]]]:
    """A title, headings and rows for each batch."""
    for batch, records in _batches(result).items():
        rows, before = [], None
        for row in records:
            is_wrong, context = _is_wrong(result, row), row["context"]
            cells = [f"{context:,}", row["model"] + " WRONG" * is_wrong, *_cells(result, row)]
            rows.append(Row(cells, row.get("missing", ""), before not in (None, context), is_wrong))
            before = context
        yield f"batch {batch}", ["context", "model", *HEADS[result["phase"]]], rows


def _cells(result: Result, row: Record) -> list[str]:
    """A row's texts under `HEADS`; the size of the language model alone if it was not measured."""
    parameters = _parameters(result, row).get("language")
    size = "" if parameters is None else f"{parameters / 1e6:,.1f} M"
    if "time" not in row:
        return [size]
    fastest = milliseconds(row["fastest"]) if "fastest" in row else ""  # on a CPU
    times = [milliseconds(row["time"]["median"]), spread(row["time"]), fastest]
    memory = [f"{row[key] / 2**20:,.1f}" for key in ("state_bytes", "peak_memory")]
    if result["phase"] == "prefill":
        tokens = f"{row['tokens']:,}" + "*" * row["in_prefill_chunks"]
        rates = [milliseconds(row["encode"]["median"]), tokens, f"{row['prompt_tokens_s']:,.0f}"]
    else:
        share = row.get("bandwidth_share")  # on a CPU
        share = "" if share is None else f"{share:.0%}"
        rates = [f"{row['tokens_s']:,.1f}", f"{row['tokens_s'] / row['batch']:,.1f}", share]
    return [size, *times, *rates, *memory]


def _is_wrong(result: Result, row: Record) -> bool:
    return not result["checks"].get(row["model"], {"is_right": True})["is_right"]


def text(result: Result) -> str:
    """All tables as text, and the comparisons of the models of a size."""
    parts = [
        f"{result['phase']}, {result['size']}, {result['dtype']}, {title}\n{as_text(heads, rows, names=(1,))}\n"
        for title, heads, rows in tables(result)
    ]
    return "\n".join([*parts, *crossings(result)])


def crossings(result: Result) -> Iterator[str]:
    """Sentences: the measured contexts at which each Mamba model is faster than the Transformer of its size."""
    for other, mine in SAME_SIZE.items():
        if SPECS["small"][other].is_ours:
            continue
        for batch, rows in _batches(result).items():
            times = {(row["model"], row["context"]): row["time"]["median"] for row in rows if "time" in row}
            contexts = sorted(c for m, c in times if m == mine and (other, c) in times)
            if not contexts:
                continue
            faster = [f"{c:,}" for c in contexts if times[mine, c] < times[other, c]]
            slower = [f"{c:,}" for c in contexts if times[mine, c] >= times[other, c]]
            found = f"{', '.join(faster)}; slower at {', '.join(slower)}"
            if not faster or not slower:
                found = f"{'every' if faster else 'no'} context measured ({contexts[0]:,} to {contexts[-1]:,})"
            yield f"{result['phase']}, batch {batch}: {mine} is faster than {other} at {found}"


def plot(result: Result) -> bytes:
    """Time with quartiles, and peak memory, against context on logarithmic axes; a row for each batch."""
    is_prefill = result["phase"] == "prefill"
    batches = _batches(result)
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    # Solid lines with a color each are the models of this project; the Transformers have their dashes.
    ours = [model for model in models if spec_of(result["size"], model)[0].is_ours]
    styles = {**line_styles(ours), **dict.fromkeys(set(models) - set(ours), {"color": INK, "linestyle": DASHES[1]})}
    figure, axes = subplots(len(batches), 2, 2.6 * len(batches) + 0.3)
    for (batch, of_batch), (time_axis, memory_axis) in zip(batches.items(), axes, strict=True):
        timed = [row for row in of_batch if "time" in row]
        labels = []
        for model in dict.fromkeys(row["model"] for row in timed):
            rows, style = [row for row in timed if row["model"] == model], styles[model]
            if _is_wrong(result, rows[0]):
                style = {**style, "color": plots.WRONG}
            x = [row["context"] for row in rows]
            peaks = [row["peak_memory"] / 2**20 for row in rows]
            for axis, heights in (time_axis, [1e3 * row["time"]["median"] for row in rows]), (memory_axis, peaks):
                axis.plot(x, heights, marker="o", markersize=3, linewidth=1.2, **style)
            labels.append((peaks[-1], model, style["color"]))
            plots.band(time_axis, x, [row["time"] for row in rows], style["color"])
        contexts = sorted({row["context"] for row in timed})
        time = "first token, ms" if is_prefill else "a step, ms"
        plots.set_log_axes(time_axis, contexts, "context, tokens", f"batch {batch}: {time}")
        plots.set_log_axes(memory_axis, contexts, "context, tokens", "peak above the weights, MiB")
        label_lines(memory_axis, labels)
    title = f"{result['phase']}, {result['size']} size, {result['dtype']}, {result['device']}"
    return png(plots.titled(figure, title))


NOTES = (
    "Random weights; LM: parameters of the language model. Medians of models that take turns. State: memory of a "
    "sequence's state, counted from the tensors; peak: above the weights. Fastest: on a CPU, the fastest call, in "
    "ms, of one core by processor time. Of bandwidth: the bytes of the language model's weights over the fastest step, "
    "as a share of the read bandwidth measured in the same run. The same image and text for all; * a prompt run in "
    "prefill chunks."
)


def page(result: Result, png: bytes) -> str:
    """One HTML page with tables, the plot, the checks and the environment."""
    body = "".join(f"<p>{escape(line)}</p>\n" for line in crossings(result))
    for title, heads, rows in tables(result):
        body += f"<h2>{title}</h2>\n{as_html(heads, rows, names=(1,))}"
    checks = [
        Row((model, f"{check['error']:.1e}", f"{check['allowed']:.1e}"), is_wrong=not check["is_right"])
        for model, check in result["checks"].items()
    ]
    heads = ("model", "largest difference, relative to the largest logit", "allowed")
    body += f"{html.quiet(NOTES)}<h2>Steps compared with prompts of the same tokens</h2>\n{as_html(heads, checks)}"
    return html.page(f"{result['phase']}, {result['size']} size, {result['dtype']}", result, png, body)
