"""Full-size rows of a paper's table: their plans, their training and evaluation, the figures beside the paper's.

A row is two commands, `vlmamba train` and `lmms-eval`, each in a process of its own. What they wrote is not made again.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...model.files import write_atomic
from ...model.presets import get_preset
from ...model.text_files import read_json
from ..plan import SampleSize, make_plan
from ..programs import run_program
from ..recipes import recipe_named
from .tables import BENCHMARKS, PaperRow, PaperTable

PEAK_TFLOPS = {"A100": 312.0, "H100": 989.5}
"""Dense bfloat16 peaks of the vendor's datasheets, NVIDIA A100 80GB SXM and H100 SXM."""
UTILIZATION = 0.4
"""Share of the peak that the hours of a plan assume. Not measured."""
TEXT_TOKENS = {"align": 32, "finetune": 350}
"""Tokens of text in a record that a plan assumes. Not measured: `vlmamba train --dry-run` counts those of the data."""


def describe(table: PaperTable, rows: Mapping[str, PaperRow], devices: int) -> str:
    """Describe data, memory and hours of the rows, without reading data or weights.

    Args:
        table: the table.
        rows: its rows to describe.
        devices: devices that a run is sharded over.

    Raises:
        ValueError: a batch cannot be divided among the devices, or a row is in miniature only.
    """
    presets = _presets(rows)
    recipe = recipe_named(table.recipe)
    lines = [table.title, *([table.note] if table.note else [])]
    data = [f"{f.annotations} ({f.n_records:,} records)" for f in (*recipe.align_data, *recipe.finetune_data)]
    lines.append(f"data: {', '.join(data)}")
    hours = [f"hours on {devices} {name}" for name in PEAK_TFLOPS]
    heads = ["row", "preset", "trained", "GiB a device", "FLOPs", *hours]
    cells = []
    for label, preset in presets.items():
        config = get_preset(preset).config
        # Both stages run one after the other: FLOPs add up, memory is that of the larger.
        flops, memory, trained = 0.0, 0, 0
        for stage, files in ((recipe.align, recipe.align_data), (recipe.finetune, recipe.finetune_data)):
            text = TEXT_TOKENS[stage.name]
            # Encoders give one token a patch.
            image = config.vision[0].encoder.grid_size ** 2
            size = SampleSize(0, text + image, text, 1.0)
            plan = make_plan(config, stage, sum(f.n_records for f in files), size, devices)
            flops += plan.flops_per_token * plan.tokens_an_epoch * stage.epochs
            memory = max(memory, plan.memory.total)
            trained = max(trained, sum(n for n, _ in plan.parameters.values()))
        times = [flops / (UTILIZATION * peak * 1e12 * devices) / 3600 for peak in PEAK_TFLOPS.values()]
        cells.append([label, preset, f"{trained / 1e9:.2f} B", f"{memory / 2**30:.0f}", f"{flops:.1e}",
                      *(f"{t:.1f}" for t in times)])  # fmt: skip
    lines += _aligned(heads, cells)
    lines.append(
        f"Assumed: {UTILIZATION:.0%} of the peak, {TEXT_TOKENS['align']} and {TEXT_TOKENS['finetune']} tokens of text a"
        " record. `vlmamba train PRESET --dry-run` counts the data's own."
    )
    return "\n".join(lines)


def run_rows(
    table: PaperTable,
    rows: Mapping[str, PaperRow],
    folder: Path,
    root: Path,
    launcher: Sequence[str] = (),
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Train and evaluate rows one after the other; a row that is finished is not run again.

    Args:
        table: the table.
        rows: its rows to run.
        folder: folder of the run: `ROW/model`, `ROW/evaluation`.
        root: folder of the recipe's data.
        launcher: command that starts the training on several devices, such as torchrun with its options.
        batch_size: requests in a batch of the evaluation.

    Returns:
        For each row its figures by benchmark, on the paper's scale.

    Raises:
        ValueError: a row is in miniature only.
        ChildProcessError: a command failed, or wrote no figure; the message has it. What was finished stays.
    """
    presets = _presets(rows)
    # Data of our own benchmarks, which the harness would download.
    names = list(table.benchmarks)
    absent = {b: root / path for b in names for path in BENCHMARKS[b].data or () if not (root / path).exists()}
    for name, path in absent.items():
        print(f"left out, since there is no {path}: {name}", flush=True)
    names = [b for b in names if b not in absent]
    judged = [b for b in names if BENCHMARKS[b].judged]
    if judged and not os.environ.get("OPENAI_API_KEY"):
        print(f"left out, since GPT judges them and OPENAI_API_KEY is not set: {', '.join(judged)}", flush=True)
        names = [b for b in names if b not in judged]
    found = {}
    for label, preset in presets.items():
        row_folder = folder / preset
        # `vlmamba train` puts the model there as its last act, whole.
        if not (row_folder / "model" / "config.json").exists():
            _run(label, [*(launcher or [sys.executable]), "-m", "vlmamba", "train", preset, "--stage", "both",
                         "--recipe", table.recipe, "--root", str(root), "--output", str(row_folder)])  # fmt: skip
        # A benchmark that the harness lost, or that had no key then, is asked for alone.
        missing = [b for b in names if b not in _figures(row_folder, names)]
        # Those that the harness has not; the rest is one command of the harness.
        for name in [b for b in missing if BENCHMARKS[b].data]:
            annotations, images = (root / path for path in BENCHMARKS[name].data or ())
            _run(label, [sys.executable, "-m", "vlmamba", "evaluate", str(row_folder / "model"), "--dtype", "bf16",
                         "--benchmark", name.lower(), "--data", str(annotations), "--images", str(images),
                         "--batch-size", str(batch_size), "--output", str(_own_figures(row_folder, name))])  # fmt: skip
            missing.remove(name)
        if missing:
            _run(label, [sys.executable, "-m", "lmms_eval", "--model", "vlmamba",
                         "--model_args", f"pretrained={row_folder / 'model'},dtype=bfloat16",
                         "--tasks", ",".join(str(BENCHMARKS[b].task) for b in missing),
                         "--batch_size", str(batch_size), "--output_path", str(row_folder / "evaluation")])  # fmt: skip
        found[label] = _figures(row_folder, names)
        if lost := [b for b in names if b not in found[label]]:
            raise ChildProcessError(f"{label}: no figure of {', '.join(lost)} was written to {row_folder}/evaluation")
    return found


def _run(label: str, command: list[str]) -> None:
    print(f"{label}: {shlex.join(command)}", flush=True)
    done = run_program(command)
    if done.returncode:
        raise ChildProcessError(
            f"{label}: exit status {done.returncode} of: {shlex.join(command)}; the same command resumes"
        )


def _presets(rows: Mapping[str, PaperRow]) -> dict[str, str]:
    """Presets of the rows by label."""
    found = {}
    for label, row in rows.items():
        if row.preset is None:
            raise ValueError(f"row {label!r} has no model at full size: add --miniature")
        found[label] = row.preset
    return found


def _own_figures(row_folder: Path, name: str) -> Path:
    """File of `vlmamba evaluate` for a benchmark that the harness has not."""
    return row_folder / "evaluation" / f"{name.lower()}.json"


def _figures(row_folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Figures of the benchmarks: in the harness's files, those of the newest first, and in our own."""
    found: dict[str, float] = {}
    for name in names:
        if BENCHMARKS[name].data and _own_figures(row_folder, name).exists():
            share = read_json(_own_figures(row_folder, name))["figures"][BENCHMARKS[name].metric]
            found[name] = BENCHMARKS[name].scale * share
    # Their names begin with the date.
    for path in sorted((row_folder / "evaluation").rglob("*_results.json"), reverse=True):
        results = read_json(path)["results"]
        for name in names:
            benchmark = BENCHMARKS[name]
            # The harness adds the name of its filter: "exact_match,none".
            values = [v for k, v in results.get(benchmark.task, {}).items() if k.split(",")[0] == benchmark.metric]
            if values and name not in found:
                found[name] = benchmark.scale * float(values[0])
    return found


def comparison(table: PaperTable, rows: Mapping[str, PaperRow], found: Mapping[str, Mapping[str, float]]) -> str:
    """Format figures beside the paper's: `ours (paper's, difference)`, `-` where there is none."""
    # A cell for each benchmark of the paper, also where only one side has a figure.
    cells = []
    for label, row in rows.items():
        line = [label]
        for name in table.benchmarks:
            ours, theirs = found.get(label, {}).get(name), row.figures.get(name)
            text = "-" if ours is None else f"{ours:.1f}"
            if theirs is not None:
                text += f" ({theirs:g})" if ours is None else f" ({theirs:g}, {ours - theirs:+.1f})"
            line.append(text)
        cells.append(line)
    return "\n".join([f"{table.title}: ours (the paper's, difference)", *_aligned(["", *table.benchmarks], cells)])


def save(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Write the figures by row and benchmark."""
    write_atomic(path, json.dumps(found, indent=2) + "\n")


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of text, the first column to the left."""
    widths = [max(len(r[i]) for r in (heads, *rows)) for i in range(len(heads))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
        for r in (heads, *rows)
    ]
