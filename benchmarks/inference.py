"""`ssm-bench prefill` and `decode`: time to first token, tokens a second and memory of whole models against context.

A cell is a model at a batch and a context. In a cell the models take turns in rounds, so that a drift of the machine
hits all alike; what the sequences of one leave is given back before the next one's turn.

The context of `prefill` is an image of the encoder's full grid and a text: the text is the same for all models, and one
that makes an image fewer tokens reads a shorter prompt. A prompt is really run. The context of `decode` is what the
sequences hold when timing begins: random values of the size that a prompt would leave, since a step's time does not
depend on them; its steps are real ones, each fed with the token that the one before chose.
"""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from ..model.files import write_whole, writing_whole
from ..model.text_files import read_json
from . import contenders, report
from .cases import DTYPES
from .contenders import CHUNK, SAME_SIZE, SPECS, Contender, Spec
from .measure import environment, on, process_status, timing
from .options import MODELS, Decode, Prefill, Size

ROUNDS = 3
WARM_UP = 5
"""Steps before those that are timed: on a GPU the graph is captured meanwhile."""
CHECKED_STEPS = 6
ALLOWED = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 16, torch.float16: 16}
"""Roundings by which a step's logits may differ from the prompt's, as a share of the largest; a deep model in a half
type rounds its activations in every layer, one in float32 also sums in another order."""
FITS = 0.9
"""Share of the free memory that may be asked for."""


@dataclass(frozen=True)
class Cell:
    """What is measured of one model at once."""

    what: Literal["prefill", "decode"]
    size: Size
    model: str
    batch: int
    context: int
    dtype: str
    device: str
    steps: int
    """Of decode."""
    max_tokens: int
    """That the model is built for."""
    chunk: int = CHUNK
    """Tokens of a prompt that are run at once."""

    @property
    def spec(self) -> Spec:
        return SPECS[self.size][self.model]

    @property
    def tokens(self) -> int:
        """What the language model has read at the end of a prompt, or before the first step."""
        if self.what == "decode":
            return self.context
        return self.context - contenders.grid_tokens(self.size) + self.spec.image_tokens

    @property
    def room(self) -> int:
        return self.tokens + (WARM_UP + self.steps if self.what == "decode" else 1)

    @property
    def type(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def work(self, parameters: int) -> float:
        """In proportion to which its time is predicted."""
        if self.what == "prefill":
            return self.spec.prompt_work(self.tokens, self.batch)
        return self.spec.step_work(self.context, self.batch, self.type, parameters)

    def needs(self, parameters: int) -> int:
        """Bytes, about."""
        kept = self.batch * self.spec.state_bytes(self.room, self.type)
        at_once = min(self.chunk, self.tokens) if self.what == "prefill" else 1
        rows = 1 if self.spec.is_ours and self.what == "prefill" else self.batch  # ours runs packed
        masks = (
            0 if self.spec.is_ours or at_once in (1, self.tokens) else at_once * self.room * (1 + self.type.itemsize)
        )
        return parameters * self.type.itemsize + kept + masks + self.spec.activation_bytes(at_once, rows, self.type)


def measure(command: Prefill | Decode) -> None:
    """Run a command: check, measure, write."""
    command = _filled(command)
    what = type(command).__name__.lower()
    with on(command.device):
        settings = {
            "what": what, "size": command.size, "dtype": command.dtype,
            **({"steps": command.steps} if what == "decode" else {}),
        }  # fmt: skip
        graph_key = environment(command.device)
        result = _resumed(command.out, settings, graph_key)
        result |= settings | graph_key | {"command": _command_line(command)}
        try:
            _measure(command, result)
            ended = True
        except KeyboardInterrupt:
            ended = False
    for batch in dict.fromkeys(row["batch"] for row in result["cells"]):
        print(table(result, batch))
    for line in crossings(result):
        print(line)
    if command.out is not None:
        write_all(result, command.out)
    if not ended:
        sys.exit("ssm-bench: interrupted; what was measured is kept, and the same command goes on from there")
    if wrong := [name for name, check in result["checks"].items() if not check["is_right"]]:
        sys.exit(f"ssm-bench: wrong: {', '.join(wrong)}; steps do not give the logits of the same tokens as a prompt")


def _filled(command: Prefill | Decode) -> Prefill | Decode:
    size = command.size or ("small" if command.device == "cpu" else "published")
    dtype = command.dtype or ("fp32" if size == "small" else "bf16")
    batch = command.batch or ((1, 8) if size == "small" else (1, 8, 64))
    least = contenders.grid_tokens(size) + 1 if isinstance(command, Prefill) else 1
    for name, values, low in (("batch", batch, 1), ("context", command.context, least)):
        if not values or min(values) < low:
            why = f" (an image of {least - 1} tokens, and a text)" if name == "context" and least > 1 else ""
            raise ValueError(f"{name} must be at least {low}{why}; got {', '.join(map(str, values)) or 'none'}")
    if not command.models:
        raise ValueError(f"models must name at least one of {', '.join(MODELS)}; got none")
    if isinstance(command, Decode) and command.steps < ROUNDS:
        raise ValueError(f"steps must be at least {ROUNDS}, one a round; got {command.steps}")
    sorted_ = {name: tuple(sorted(set(values))) for name, values in (("batch", batch), ("context", command.context))}
    models = tuple(dict.fromkeys(command.models))
    return dataclasses.replace(command, size=size, dtype=dtype, models=models, **sorted_)


def _resumed(path: Path | None, settings: dict, graph_key: dict) -> dict:
    """What an earlier run of the same command left, without the cells that it could not measure."""
    if path is None or not path.exists():
        return {"models": {}, "checks": {}, "cells": []}
    try:
        old = read_json(path)
        cells = [row for row in old["cells"] if "missing" not in row]
        kept = {"models": old["models"], "checks": old["checks"], "cells": cells}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"out: {path} is no file of ssm-bench {settings['what']}, and is not overwritten: {e}") from e
    asked = settings | {key: graph_key[key] for key in ("device", "threads", "packages")}
    for key, value in asked.items():
        if old.get(key) != value:
            raise ValueError(f"out: {path} was measured with {key} {old.get(key)}, not {value}; name another file")
    return kept


def _measure(command: Prefill | Decode, result: dict) -> None:
    what, size = result["what"], command.size
    steps = command.steps if isinstance(command, Decode) else 0
    rates: dict[str, tuple[float, float]] = {}  # seconds and the work that they were spent on, of the largest so far
    absent: dict[str, str] = {}
    most = max(command.context) + WARM_UP + steps + ROUNDS
    for model in command.models:
        spec = SPECS[size][model]
        try:
            contenders.check_installed(spec)
        except ModuleNotFoundError as e:
            absent[model] = str(e)
            continue
        meta = contenders.build(spec, DTYPES[command.dtype], "meta", 1)
        result["models"][model] = {"parameters": meta.parameters, "same_size_as": SAME_SIZE.get(model)}
    weights = sum(sum(m["parameters"].values()) for m in result["models"].values()) * DTYPES[command.dtype].itemsize
    models = Models(keep=weights < free_memory(command.device) // 4)
    bar = tqdm(total=len(command.models) * len(command.batch) * len(command.context), unit="cell", file=sys.stderr)
    with bar, torch.inference_mode():
        for batch in command.batch:
            for context in command.context:
                cells = [
                    Cell(what, size, m, batch, context, command.dtype, command.device, steps, most)
                    for m in command.models
                ]
                bar.set_description(f"batch {batch}, context {context:,}")
                rows = {row["model"]: row for row in result["cells"] if _place(row) == (batch, context)}
                runnable: list[Cell] = []
                for cell in cells:
                    row = rows.setdefault(cell.model, {"model": cell.model, "batch": batch, "context": context})
                    if "time" in row:
                        parameters = sum(result["models"][cell.model]["parameters"].values())
                        rates[cell.model] = (row["time"]["median"], cell.work(parameters))
                    elif cell.model in absent:
                        row["missing"] = absent[cell.model]
                    elif why := _why_not(cell, command.budget, result, rates, models):
                        row["missing"] = why
                    else:
                        runnable.append(cell)
                _together(runnable, rows, command.budget, result["models"], rates, models)
                done = [rows[m] for m in command.models]
                others = [row for row in result["cells"] if row not in done and _place(row) != (batch, context)]
                result["cells"] = others + list(rows.values())
                if command.out is not None:
                    _write(command.out, result)
                bar.update(len(cells))


def _place(row: dict) -> tuple[int, int]:
    return row["batch"], row["context"]


def _why_not(
    cell: Cell, budget: float, result: dict, rates: dict[str, tuple[float, float]], models: Models
) -> str | None:
    """Why a cell is not run, if so; a model is checked before its first cell."""
    parameters = sum(result["models"][cell.model]["parameters"].values())
    fitting = _fitting(cell, parameters)
    if isinstance(fitting, str):
        return fitting
    if cell.model not in rates or cell.model not in result["checks"]:
        try:
            check, seconds, work = _check(models.get(cell), cell, parameters)
        except (RuntimeError, MemoryError) as e:
            return _out_of_memory(e)
        result["checks"][cell.model] = check
        rates.setdefault(cell.model, (seconds, work))
    seconds, work = rates[cell.model]
    predicted = seconds * max(1.0, cell.work(parameters) / work)
    predicted *= 1 if cell.what == "prefill" else WARM_UP + -(-cell.steps // ROUNDS)  # a round
    if predicted > budget:
        return f"skipped: predicted {predicted:,.0f} s, more than the budget of {budget:g} s"
    return None


def _fitting(cell: Cell, parameters: int) -> Cell | str:
    """The cell as it fits in memory, by pieces if it must be; or what it would need."""
    there = int(FITS * free_memory(cell.device))
    for chunk in (cell.tokens, CHUNK) if cell.what == "prefill" and not cell.spec.is_ours else (CHUNK,):
        fitting = dataclasses.replace(cell, chunk=chunk)
        needs = fitting.needs(parameters)
        if needs <= there:
            return fitting
    return f"does not fit: needs about {needs / 2**30:,.1f} GiB, and {there / 2**30:,.1f} GiB may be taken"


def free_memory(device: str) -> int:
    """Bytes that a process may still take, within its control group on a CPU (Linux)."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)


class Models:
    """Models as they are needed: kept, or built anew each time where all of them would take too much memory."""

    def __init__(self, keep: bool):
        self.keep, self.kept = keep, {}

    def get(self, cell: Cell) -> Contender:
        if cell.model in self.kept:
            return self.kept[cell.model]
        gc.collect()  # the one before may be held by cycles alone
        contender = contenders.build(cell.spec, cell.type, cell.device, cell.max_tokens)
        if self.keep:
            self.kept[cell.model] = contender
        return contender


def _check(contender: Contender, cell: Cell, parameters: int) -> tuple[dict, float, float]:
    """Steps against prompts of the same tokens, and a prompt in pieces against a whole one, for two sequences: what was
    found; and the seconds of such a prompt or step, with its work."""
    batch, extra = 2, 16
    n_text = extra + CHECKED_STEPS
    n = cell.spec.image_tokens + extra
    contender.start(batch, n + CHECKED_STEPS)
    text = _text(cell, batch, n_text)
    prompt = contender.prompt(contender.encode(contender.images(batch)), text)
    n_prompt = n + CHECKED_STEPS
    expected = [contender.prefill(prompt, n + i, n_prompt * batch).clone() for i in range(CHECKED_STEPS + 1)]
    begin = time.perf_counter()
    found = [contender.prefill(prompt, n, n // 2 + 1).clone()]
    _wait(cell.device)
    seconds = time.perf_counter() - begin
    work = cell.spec.prompt_work(n, batch)
    for i in range(CHECKED_STEPS):
        _wait(cell.device)
        begin_step = time.perf_counter()
        found.append(contender.step(text[:, extra + i]).clone())
        _wait(cell.device)
    if cell.what == "decode":
        seconds = time.perf_counter() - begin_step
        work = cell.spec.step_work(n, batch, cell.type, parameters)
    # By torch's max, which a NaN does not get past.
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    error = torch.stack(errors).max().item()
    allowed = ALLOWED[cell.type] * torch.finfo(cell.type).eps
    return {"error": error, "allowed": allowed, "is_right": error <= allowed}, seconds, work


def _text(cell: Cell, batch: int, n: int) -> torch.Tensor:
    """The same random tokens for every model, within the smallest vocabulary."""
    smallest = min(spec.vocab_size for spec in SPECS[cell.size].values())
    drawn = torch.randint(smallest, (batch, n), generator=torch.Generator().manual_seed(1))
    return drawn.to(cell.device)


def _together(
    cells: Sequence[Cell],
    rows: dict[str, dict],
    budget: float,
    known: dict,
    rates: dict[str, tuple[float, float]],
    models: Models,
) -> None:
    """Measure the cells of several models in turn, and complete their rows."""
    found: dict[str, list[dict]] = {cell.model: [] for cell in cells}
    for _ in range(ROUNDS):
        for cell in cells:
            parameters = sum(known[cell.model]["parameters"].values())
            row, done = rows[cell.model], found[cell.model]
            spent = sum(sum(one["seconds"]) for one in done)
            if "missing" in row or (done and spent * (len(done) + 1) / len(done) > budget):
                continue
            fitting = _fitting(cell, parameters)
            if isinstance(fitting, str):
                row["missing"] = fitting
                continue
            try:
                done.append(once(models.get(fitting), fitting))
                if not _is_cpu(cell):
                    row["peak_memory"] = done[-1]["peak_memory"]
                elif "peak_memory" not in row:
                    row["peak_memory"] = peak_memory(fitting)
            except (RuntimeError, MemoryError) as e:
                row["missing"] = _out_of_memory(e)
                continue
            row["in_pieces"] = fitting.what == "prefill" and fitting.chunk < cell.tokens
    for cell in cells:
        row, done = rows[cell.model], found[cell.model]
        if "missing" in row:
            continue
        time_ = timing([s for one in done for s in one["seconds"]])
        row |= {"time": asdict(time_), "tokens": cell.tokens, "state_bytes": done[0]["state_bytes"]}
        if cell.what == "prefill":
            encode = timing([one["encode"] for one in done])
            in_prompt = timing([s - one["encode"] for one in done for s in one["seconds"]])
            row |= {"encode": asdict(encode), "prompt_tokens_s": cell.batch * cell.tokens / in_prompt.median}
        else:
            row["tokens_s"] = cell.batch / time_.median
        rates[cell.model] = (time_.median, cell.work(sum(known[cell.model]["parameters"].values())))


def once(contender: Contender, cell: Cell) -> dict:
    """One turn of a model: seconds of each call, bytes that each sequence leaves, and memory on a GPU."""
    if not _is_cpu(cell):
        torch.cuda.reset_peak_memory_stats(cell.device)
        before = torch.cuda.memory_allocated(cell.device)
    try:
        run = _prompt(contender, cell) if cell.what == "prefill" else _steps(contender, cell)
        found = run | {"state_bytes": contender.state_bytes(cell.tokens) // cell.batch}
    finally:
        contender.end()
    if not _is_cpu(cell):
        found["peak_memory"] = torch.cuda.max_memory_allocated(cell.device) - before
    return found


def _prompt(contender: Contender, cell: Cell) -> dict:
    """From images to a token, after a small one that compiles and allocates what is allocated once."""
    text = _text(cell, cell.batch, cell.tokens - cell.spec.image_tokens)
    images = contender.images(cell.batch)
    few = min(cell.tokens, cell.spec.image_tokens + 8)
    contender.start(cell.batch, cell.room)
    contender.prefill(contender.prompt(contender.encode(images), text), few, cell.chunk).argmax(-1)
    _wait(cell.device)
    begin = time.perf_counter()
    features = contender.encode(images)
    _wait(cell.device)
    encoded = time.perf_counter()
    contender.prefill(contender.prompt(features, text), cell.tokens, cell.chunk).argmax(-1)
    _wait(cell.device)
    return {"seconds": [time.perf_counter() - begin], "encode": encoded - begin}


def _steps(contender: Contender, cell: Cell) -> dict:
    contender.start(cell.batch, cell.room)
    contender.fill(cell.context)
    tokens = _text(cell, cell.batch, 1)[:, 0]
    seconds = []
    for i in range(WARM_UP + -(-cell.steps // ROUNDS)):
        _wait(cell.device)
        begin = time.perf_counter()
        tokens = contender.step(tokens).argmax(-1)
        _wait(cell.device)
        if i >= WARM_UP:
            seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _is_cpu(cell: Cell) -> bool:
    return cell.device == "cpu"


def _out_of_memory(e: RuntimeError | MemoryError) -> str:
    """What a row says of a failure for want of memory; any other is a fault, and raised.

    PyTorch's allocator on the CPU has no type of error for it: its RuntimeError is known by the text alone.
    """
    by_text = "DefaultCPUAllocator: can't allocate memory" in str(e)
    if isinstance(e, torch.OutOfMemoryError | MemoryError) or by_text:
        return "out of memory"
    raise e


PRELOAD = [
    "vlmamba.benchmarks.inference", "transformers.models.llama.modeling_llama", "transformers.models.phi.modeling_phi",
]  # fmt: skip


def peak_memory(cell: Cell) -> int:
    """Bytes by which a call raises a fresh process's resident memory above that with the weights (Linux).

    Raises:
        MemoryError: the kernel stopped the process, as it does with one that takes too much.
        RuntimeError: the process ended otherwise than it should.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)  # so that a child need not import them
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=_peak_memory_here, args=(cell, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        child.join()
        if child.exitcode == -9:
            raise MemoryError("the process that measures memory was stopped by the kernel") from None
        raise RuntimeError(f"the process that measures memory ended with {child.exitcode}") from None
    child.join()
    return found


def _peak_memory_here(cell: Cell, answer) -> None:
    with torch.inference_mode():
        contender = contenders.build(cell.spec, cell.type, cell.device, cell.max_tokens)
        # What libraries allocate once is not the call's; and memory that was given back must not serve it unseen.
        few = contenders.grid_tokens(cell.size) + 8
        once(contender, dataclasses.replace(cell, context=few, batch=1, steps=1))
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = process_status("VmRSS")
        (_prompt if cell.what == "prefill" else _steps)(contender, cell)
        answer.send(max(0, process_status("VmHWM") - before))


def _write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1) + "\n")


COLUMNS = {
    "prefill": ("median", "low", "high", "calls", "encode", "tokens", "prompt_tokens_s", "state_bytes", "peak_memory"),
    "decode": ("median", "low", "high", "calls", "tokens_s", "state_bytes", "peak_memory"),
}
"""Of the CSV, after what names the cell; seconds and bytes."""


def write_all(result: dict, path: Path) -> None:
    """JSON at the path and, beside it, CSV, PNG where matplotlib is, and HTML."""
    _write(path, result)
    with writing_whole(path.with_suffix(".csv")) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        every = {key: result[key] for key in ("what", "size", "dtype", "device", "commit")}
        names = ("model", "lm_parameters", "parameters", "batch", "context")
        columns = [*every, *names, *COLUMNS[result["what"]], "in_pieces", "is_right", "missing"]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in result["cells"]:
            parameters = result["models"].get(row["model"], {}).get("parameters", {})
            writer.writerow(
                {
                    **every, **row, **row.get("time", {}), "encode": row.get("encode", {}).get("median"),
                    "lm_parameters": parameters.get("language"), "parameters": sum(parameters.values()) or None,
                    "is_right": result["checks"].get(row["model"], {}).get("is_right"),
                }
            )  # fmt: skip
    plot = b""
    if any("time" in row for row in result["cells"]):
        try:
            plot = plotted(result)
            write_whole(path.with_suffix(".png"), plot)
        except ModuleNotFoundError as e:
            print(f"no plot: {e}")
    write_whole(path.with_suffix(".html"), page(result, plot))
    print(f"wrote {path}")


def _heads(what: str) -> tuple[str, ...]:
    if what == "prefill":
        return ("LM", "first token ms", "quartiles", "encoder ms", "tokens", "tokens/s", "state MiB", "peak MiB")
    return ("LM", "ms a step", "quartiles", "tokens/s", "each", "state MiB", "peak MiB")


def _cells(result: dict, row: dict) -> list[str]:
    """What a row shows under `_heads`; alone its language model where it was not measured."""
    parameters = result["models"].get(row["model"], {}).get("parameters", {}).get("language")
    size = "" if parameters is None else f"{parameters / 1e6:,.1f} M"
    if "time" not in row:
        return [size]
    t, ms = row["time"], report.milliseconds
    memory = [f"{row[key] / 2**20:,.1f}" for key in ("state_bytes", "peak_memory")]
    spread = f"{ms(t['low'])} to {ms(t['high'])}" if t["calls"] > 1 else "one call"
    if result["what"] == "prefill":
        read = f"{row['tokens']:,}" + "*" * row["in_pieces"]
        encode = ms(row["encode"]["median"])
        return [size, ms(t["median"]), spread, encode, read, f"{row['prompt_tokens_s']:,.0f}", *memory]
    return [size, ms(t["median"]), spread, f"{row['tokens_s']:,.1f}", f"{row['tokens_s'] / row['batch']:,.1f}", *memory]


def _is_wrong(result: dict, row: dict) -> bool:
    return not result["checks"].get(row["model"], {"is_right": True})["is_right"]


def table(result: dict, batch: int) -> str:
    """The rows of a batch as lines of text."""
    heads = _heads(result["what"])
    widths = [11, 14, 24] + [11] * (len(heads) - 3)
    lines = [f"{result['what']}, {result['size']}, {result['dtype']}, batch {batch}"]
    lines.append(f"{'context':>9}  {'':<27}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)))
    for row in sorted((r for r in result["cells"] if r["batch"] == batch), key=lambda r: r["context"]):
        cells = "".join(f"{cell:>{w}}" for cell, w in zip(_cells(result, row), widths, strict=False))
        end = f"    {row['missing']}" if "missing" in row else ""
        lines.append(f"{row['context']:>9,}  {row['model']:<27}{cells}{end}" + "  WRONG" * _is_wrong(result, row))
    return "\n".join(lines) + "\n"


def crossings(result: dict) -> Iterator[str]:
    """In words, where each of ours is faster than the Transformer of its size, of what was measured."""
    for other, mine in SAME_SIZE.items():
        if other == "ml-mamba-on-mamba1":
            continue
        for batch in sorted({row["batch"] for row in result["cells"]}):
            times = {
                (row["model"], row["context"]): row["time"]["median"]
                for row in result["cells"]
                if row["batch"] == batch and "time" in row
            }
            contexts = sorted(c for m, c in times if m == mine and (other, c) in times)
            if not contexts:
                continue
            faster = [c for c in contexts if times[mine, c] < times[other, c]]
            begin = f"{result['what']}, batch {batch}: {mine} is faster than {other}"
            if not faster:
                yield f"{begin} at no context measured ({contexts[0]:,} to {contexts[-1]:,})"
            elif faster == contexts:
                yield f"{begin} at every context measured ({contexts[0]:,} to {contexts[-1]:,})"
            else:
                yield f"{begin} at {', '.join(f'{c:,}' for c in faster)}; slower at " + ", ".join(
                    f"{c:,}" for c in contexts if c not in faster
                )


COLORS = {
    "vl-mamba": "#1f5fa8", "transformer-siglip": "#d9822b", "ml-mamba": "#2e7d32", "ml-mamba-on-mamba1": "#8bc34a",
    "transformer-dinov2-siglip": "#c9a227", "tinyllava": "#7b4fa3", "mobilevlm-v2": "#a0522d",
}  # fmt: skip


def plotted(result: dict) -> bytes:
    """Against context, on logarithmic axes, as PNG: time with quartiles, tokens a second, memory; a row a batch."""
    plt = report.pyplot_headless()
    rate = "prompt_tokens_s" if result["what"] == "prefill" else "tokens_s"
    first = "time to first token, s" if result["what"] == "prefill" else "s a step"
    panels = (first, "tokens/s", "state or KV cache, MiB a sequence", "peak above the weights, MiB")
    batches = sorted({row["batch"] for row in result["cells"]})
    figure, axes = plt.subplots(len(batches), 4, figsize=(18, 3.9 * len(batches) + 0.6), squeeze=False)
    for batch, row_of_axes in zip(batches, axes, strict=True):
        for axis, panel in zip(row_of_axes, panels, strict=True):
            contexts = set()
            for model in dict.fromkeys(row["model"] for row in result["cells"]):
                rows = [r for r in result["cells"] if (r["model"], r["batch"]) == (model, batch) and "time" in r]
                if not rows:
                    continue
                rows.sort(key=lambda r: r["context"])
                x = [r["context"] for r in rows]
                contexts |= set(x)
                y = {
                    panels[0]: [r["time"]["median"] for r in rows], panels[1]: [r[rate] for r in rows],
                    panels[2]: [r["state_bytes"] / 2**20 for r in rows],
                    panels[3]: [r["peak_memory"] / 2**20 for r in rows],
                }[panel]  # fmt: skip
                color = report.WRONG if _is_wrong(result, rows[0]) else COLORS[model]
                style = "o-" if SPECS[result["size"]][model].is_ours else "s--"
                axis.plot(x, y, style, color=color, markersize=4, label=model)
                if panel == first:
                    low, high = ([r["time"][key] for r in rows] for key in ("low", "high"))
                    axis.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sorted(contexts), [f"{c:,}" for c in sorted(contexts)], rotation=30)
            axis.set_xlabel("context, tokens", fontsize=8)
            axis.set_title(f"batch {batch}: {panel}", fontsize=9, loc="left")
            axis.grid(alpha=0.25, which="major")
            report.plain_ticks(axis)
    axes[0][0].legend(fontsize=7, frameon=False)
    return report.png(figure, f"{result['what']}, {result['size']} size, {result['dtype']}, {result['device']}")


def page(result: dict, plot: bytes) -> str:
    """One HTML file that opens offline."""
    e = report.escape
    title = f"{result['what']}, {result['size']} size, {result['dtype']}"
    heads = "".join(f"<th>{e(h)}</th>" for h in _heads(result["what"]))
    body = ""
    for batch in sorted({row["batch"] for row in result["cells"]}):
        rows, before = "", None
        for row in sorted((r for r in result["cells"] if r["batch"] == batch), key=lambda r: r["context"]):
            cells = "".join(f"<td>{e(c)}</td>" for c in _cells(result, row))
            if "missing" in row:
                cells += f'<td class="missing" colspan="{len(_heads(result["what"])) - 1}">{e(row["missing"])}</td>'
            wrong = _is_wrong(result, row)
            kinds = ["first"] * (before not in (None, row["context"])) + ["wrong"] * wrong
            before = row["context"]
            name = e(row["model"]) + " WRONG" * wrong
            rows += f'<tr class="{" ".join(kinds)}"><td>{before:,}</td><td class="name">{name}</td>{cells}</tr>\n'
        body += (
            f'<h2>Batch {batch}</h2>\n<table><thead><tr><th>context</th><th class="name">model</th>{heads}</tr></thead>'
            f"\n<tbody>{rows}</tbody></table>\n"
        )
    checks = "".join(
        f'<tr class="{"" if c["is_right"] else "wrong"}"><td class="name">{e(m)}</td><td>{c["error"]:.1e}</td>'
        f"<td>{c['allowed']:.1e}</td></tr>\n"
        for m, c in result["checks"].items()
    )
    packages = {name: version or "not installed" for name, version in result["packages"].items()}
    facts = {key: result[key] for key in report.FACTS if result[key] is not None} | packages
    known = "".join(f'<tr><td class="name">{e(k)}</td><td class="name">{e(v)}</td></tr>' for k, v in facts.items())
    notes = (
        "Random weights; LM: parameters of the language model. Medians of models that take turns. State: what a "
        "sequence leaves in memory, counted from the tensors; peak: above the weights. The same image and text for "
        "all; * a prompt run in pieces. "
    )
    crossing = "".join(f"<p>{e(line)}</p>\n" for line in crossings(result))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{e(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{report.STYLE}</style></head><body>\n<h1>{e(title)}</h1>\n'
        f'<p class="quiet">{e(result["device"])}, commit {e(result["commit"])}, {e(result["date"])}</p>\n'
        f"<p><code>{e(result['command'])}</code></p>\n{crossing}"
        f"{report.img(plot, 'against context, logarithmic') if plot else ''}{body}"
        f'<p class="quiet">{e(notes)}</p>\n<h2>Steps against prompts of the same tokens</h2>\n<table><thead><tr>'
        f'<th class="name">model</th><th>largest difference, a share of the largest logit</th><th>allowed</th></tr>'
        f"</thead><tbody>{checks}</tbody></table>\n<h2>Environment</h2>\n<table>{known}</table>\n</body></html>\n"
    )


def _command_line(command: Prefill | Decode) -> str:
    """What gives the figures again, without where it was written."""
    words = ["ssm-bench", type(command).__name__.lower()]
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if field.name == "out" or value == field.default:
            continue
        words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)
