"""Results of `ssm-bench prefill` and `decode`: text table, JSON, CSV, a plot as PNG, and a page as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...model.files import write_atomic
from .. import html, plots
from ..files import write_csv, write_json
from ..op_report import spread
from ..plots import milliseconds
from .specs import SAME_SIZE, SPECS

COLUMNS = {
    "prefill": ("median", "low", "high", "calls", "encode", "tokens", "prompt_tokens_s", "state_bytes", "peak_memory"),
    "decode": ("median", "low", "high", "calls", "tokens_s", "state_bytes", "peak_memory"),
}
"""Columns of the CSV, after those that name the row; seconds and bytes."""
HEADS = {
    "prefill": ("LM", "first token ms", "quartiles", "encoder ms", "tokens", "tokens/s", "state MiB", "peak MiB"),
    "decode": ("LM", "ms a step", "quartiles", "tokens/s", "each", "state MiB", "peak MiB"),
}
"""Headings of a table, after context and model."""
COLORS = {
    "vl-mamba": "#1f5fa8", "transformer-siglip": "#d9822b", "ml-mamba": "#2e7d32", "ml-mamba-on-mamba1": "#8bc34a",
    "transformer-dinov2-siglip": "#c9a227", "tinyllava": "#7b4fa3", "mobilevlm-v2": "#a0522d",
}  # fmt: skip
Result = Mapping[str, Any]
Row = Mapping[str, Any]


def write_all(result: Result, path: Path) -> None:
    """Write JSON and, beside it, CSV, HTML and, with matplotlib, PNG."""
    write_json(path, result, indent=1, quietly=True)
    write_csv(path.with_suffix(".csv"), *_csv(result))
    png = b""
    if any("time" in row for row in result["rows"]):
        try:
            png = plot(result)
            write_atomic(path.with_suffix(".png"), png)
        except ModuleNotFoundError as e:
            print(f"no plot: {e}")
    write_atomic(path.with_suffix(".html"), page(result, png))
    print(f"wrote {path}")


def _csv(result: Result) -> tuple[list[str], list[dict[str, Any]]]:
    common = {key: result[key] for key in ("phase", "size", "dtype", "device", "commit")}
    names = ("model", "lm_parameters", "parameters", "batch", "context")
    lines = []
    for row in result["rows"]:
        parameters = _parameters(result, row)
        lines.append(
            {
                **common, **row, **row.get("time", {}), "encode": row.get("encode", {}).get("median"),
                "lm_parameters": parameters.get("language"), "parameters": sum(parameters.values()) or None,
                "is_right": result["checks"].get(row["model"], {}).get("is_right"),
            }
        )  # fmt: skip
    return [*common, *names, *COLUMNS[result["phase"]], "in_prefill_chunks", "is_right", "missing"], lines


def _parameters(result: Result, row: Row) -> dict[str, int]:
    return result["models"].get(row["model"], {}).get("parameters", {})


def _batches(result: Result) -> list[int]:
    return sorted({row["batch"] for row in result["rows"]})


def _rows(result: Result, batch: int) -> list[dict[str, Any]]:
    """Rows of a batch by context."""
    return sorted((row for row in result["rows"] if row["batch"] == batch), key=lambda row: row["context"])


def _cells(result: Result, row: Row) -> list[str]:
    """A row's texts under `HEADS`; the size of the language model alone if it was not measured."""
    parameters = _parameters(result, row).get("language")
    size = "" if parameters is None else f"{parameters / 1e6:,.1f} M"
    if "time" not in row:
        return [size]
    times = [milliseconds(row["time"]["median"]), spread(row["time"])]
    memory = [f"{row[key] / 2**20:,.1f}" for key in ("state_bytes", "peak_memory")]
    if result["phase"] == "prefill":
        tokens = f"{row['tokens']:,}" + "*" * row["in_prefill_chunks"]
        rates = [milliseconds(row["encode"]["median"]), tokens, f"{row['prompt_tokens_s']:,.0f}"]
    else:
        rates = [f"{row['tokens_s']:,.1f}", f"{row['tokens_s'] / row['batch']:,.1f}"]
    return [size, *times, *rates, *memory]


def _is_wrong(result: Result, row: Row) -> bool:
    return not result["checks"].get(row["model"], {"is_right": True})["is_right"]


def table(result: Result, batch: int) -> str:
    """The rows of a batch as text."""
    heads = HEADS[result["phase"]]
    widths = [11, 14, 24] + [11] * (len(heads) - 3)
    lines = [f"{result['phase']}, {result['size']}, {result['dtype']}, batch {batch}"]
    lines.append(f"{'context':>9}  {'':<27}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)))
    for row in _rows(result, batch):
        cells = "".join(f"{cell:>{w}}" for cell, w in zip(_cells(result, row), widths, strict=False))
        end = f"    {row['missing']}" if "missing" in row else ""
        lines.append(f"{row['context']:>9,}  {row['model']:<27}{cells}{end}" + "  WRONG" * _is_wrong(result, row))
    return "\n".join(lines) + "\n"


def crossings(result: Result) -> Iterator[str]:
    """Sentences: the measured contexts at which each Mamba model is faster than the Transformer of its size."""
    for other, mine in SAME_SIZE.items():
        if SPECS["small"][other].is_ours:
            continue
        for batch in _batches(result):
            rows = [row for row in _rows(result, batch) if "time" in row]
            times = {(row["model"], row["context"]): row["time"]["median"] for row in rows}
            contexts = sorted(c for m, c in times if m == mine and (other, c) in times)
            if not contexts:
                continue
            faster = [c for c in contexts if times[mine, c] < times[other, c]]
            start = f"{result['phase']}, batch {batch}: {mine} is faster than {other}"
            span = f"({contexts[0]:,} to {contexts[-1]:,})"
            if not faster:
                yield f"{start} at no context measured {span}"
            elif faster == contexts:
                yield f"{start} at every context measured {span}"
            else:
                slower = [c for c in contexts if c not in faster]
                yield f"{start} at {', '.join(f'{c:,}' for c in faster)}; slower at " + ", ".join(
                    f"{c:,}" for c in slower
                )


def plot(result: Result) -> bytes:
    """Time with quartiles, tokens a second and memory against context, on logarithmic axes; a row for each batch."""
    plt = plots.pyplot_headless()
    is_prefill = result["phase"] == "prefill"
    rate = "prompt_tokens_s" if is_prefill else "tokens_s"
    panels = {
        "time to first token, s" if is_prefill else "s a step": lambda row: row["time"]["median"],
        "tokens/s": lambda row: row[rate],
        "state or KV cache, MiB a sequence": lambda row: row["state_bytes"] / 2**20,
        "peak above the weights, MiB": lambda row: row["peak_memory"] / 2**20,
    }
    batches = _batches(result)
    figure, axes = plt.subplots(len(batches), 4, figsize=(18, 3.9 * len(batches) + 0.6), squeeze=False)
    for batch, row_of_axes in zip(batches, axes, strict=True):
        timed = [row for row in _rows(result, batch) if "time" in row]
        contexts = sorted({row["context"] for row in timed})
        for i, (axis, (title, value)) in enumerate(zip(row_of_axes, panels.items(), strict=True)):
            for model in dict.fromkeys(row["model"] for row in result["rows"]):
                rows = [row for row in timed if row["model"] == model]
                if not rows:
                    continue
                x = [row["context"] for row in rows]
                color = plots.WRONG if _is_wrong(result, rows[0]) else COLORS[model]
                style = "o-" if SPECS[result["size"]][model].is_ours else "s--"
                axis.plot(x, [value(row) for row in rows], style, color=color, markersize=4, label=model)
                if i == 0:
                    low, high = ([row["time"][key] for row in rows] for key in ("low", "high"))
                    axis.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
            plots.set_log_axes(axis, contexts, "context, tokens")
            axis.set_title(f"batch {batch}: {title}", fontsize=9, loc="left")
    axes[0][0].legend(fontsize=7, frameon=False)
    return plots.png(figure, f"{result['phase']}, {result['size']} size, {result['dtype']}, {result['device']}")


NOTES = (
    "Random weights; LM: parameters of the language model. Medians of models that take turns. State: memory of a "
    "sequence's state, counted from the tensors; peak: above the weights. The same image and text for all; * a prompt "
    "run in prefill chunks."
)


def page(result: Result, png: bytes) -> str:
    """One HTML page with tables, the plot, the checks and the environment."""
    body = "".join(f"<p>{html.escape(line)}</p>\n" for line in crossings(result))
    body += html.image(png, "against context, logarithmic") if png else ""
    for batch in _batches(result):
        rows, before = [], None
        for row in _rows(result, batch):
            is_wrong, context = _is_wrong(result, row), row["context"]
            cells = [f"{context:,}", row["model"] + " WRONG" * is_wrong, *_cells(result, row)]
            rows.append(html.Row(cells, row.get("missing", ""), before not in (None, context), is_wrong))
            before = context
        heads = ("context", "model", *HEADS[result["phase"]])
        body += f"<h2>Batch {batch}</h2>\n{html.table(heads, rows, names=(1,))}"
    checks = [
        html.Row((model, f"{check['error']:.1e}", f"{check['allowed']:.1e}"), is_wrong=not check["is_right"])
        for model, check in result["checks"].items()
    ]
    heads = ("model", "largest difference, relative to the largest logit", "allowed")
    body += f"{html.quiet(NOTES)}<h2>Steps compared with prompts of the same tokens</h2>\n{html.table(heads, checks)}"
    return html.page(f"{result['phase']}, {result['size']} size, {result['dtype']}", result, body)
