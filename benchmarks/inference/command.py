"""`ssm-bench prefill` and `decode`: time to first token, tokens a second and memory of models against context.

At each batch and context the models take turns in rounds, so that a drift of the machine affects all alike; a model's
state is freed before the next one's turn.

The context of `prefill` is an image of the encoder's complete grid and a text: the text is the same for all models, and
a model whose images are fewer tokens reads a shorter prompt. The prompt is really run. The context of `decode` is the
length of the sequences when timing starts: their states hold random values, since a step's time does not depend on
them; its steps are real ones, each of which takes the token that the one before chose. A quantized model has rows
of its own, as another model.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...model.quantize import check_quantization
from ...model.text_files import read_json
from ...train.errors import Interrupted, Terminated
from .. import memory
from ..cases import DTYPES
from ..environment import command_line, current_device, environment
from ..files import write_json
from ..options import Decode, Prefill, Size
from ..timing import summarize
from . import measure, report
from .measure import ROUNDS, WARM_UP, Point
from .models import InferenceModel, build
from .specs import SAME_SIZE, SPECS, grid_tokens, spec_of

Row = dict[str, Any]


def run_inference(command: Prefill) -> None:
    """`ssm-bench prefill` and `decode`: check, measure, write."""
    command = _with_defaults(command)
    phase = type(command).__name__.lower()
    if isinstance(command, Decode):
        for quantize in command.quantize:
            check_quantization(quantize)
    with current_device(command.device):
        settings = {"phase": phase, "size": command.size, "dtype": command.dtype}
        settings |= {"steps": command.steps} if isinstance(command, Decode) else {}
        facts = environment(command.device)
        result = _resume(command.out, settings, facts)
        result |= settings | facts | {"command": command_line(command)}
        stopped: KeyboardInterrupt | Terminated | None = None
        try:
            _Session(command, result).run()
        except (KeyboardInterrupt, Terminated) as e:
            stopped = e
    print(report.text(result))
    if command.out is not None:
        report.write_all(result, command.out)
    if stopped is not None:
        if command.out is None:
            raise stopped
        raise Interrupted(130 if isinstance(stopped, KeyboardInterrupt) else 143)
    if wrong := [name for name, check in result["checks"].items() if not check["is_right"]]:
        sys.exit(f"ssm-bench: wrong: {', '.join(wrong)}; steps do not have the logits of the same tokens as a prompt")


def _with_defaults(command: Prefill) -> Prefill:
    """The command with its defaults and its values in order.

    Raises:
        ValueError: a value is out of range.
    """
    size: Size = command.size or ("small" if command.device == "cpu" else "published")
    dtype = command.dtype or ("fp32" if size == "small" else "bf16")
    batch = command.batch or ((1, 8) if size == "small" else (1, 8, 64))
    for name, values in (("models", command.models), ("context", command.context)):
        if not values:
            raise ValueError(f"{name} must have at least one value; got none")
    least = grid_tokens(size) + 1
    if not isinstance(command, Decode) and min(command.context) < least:
        why = f"(an image of {least - 1} tokens, and a text)"
        raise ValueError(f"context must be at least {least} {why}; got {', '.join(map(str, command.context))}")
    if isinstance(command, Decode) and command.steps < ROUNDS:
        raise ValueError(f"steps must be at least {ROUNDS}, one a round; got {command.steps}")
    batch, context = (tuple(sorted(set(values))) for values in (batch, command.context))
    models = tuple(dict.fromkeys(command.models))
    return dataclasses.replace(command, size=size, dtype=dtype, models=models, batch=batch, context=context)


def variants(command: Prefill) -> list[str]:
    """The models, and after each of this project's its quantized ones: "vl-mamba", "vl-mamba int8"."""
    assert command.size is not None
    kinds = command.quantize if isinstance(command, Decode) else ()
    return [
        " ".join([model, *kind])
        for model in command.models
        for kind in [(), *((quantize,) for quantize in kinds if SPECS[command.size][model].is_ours)]
    ]


def _resume(path: Path | None, settings: Row, facts: Row) -> dict[str, Any]:
    """The result of an earlier run of the same command, without the rows that it could not measure.

    Raises:
        ValueError: the file is none of this command, or was measured with other settings or on another machine.
    """
    if path is None or not path.exists():
        return {"models": {}, "checks": {}, "rows": []}
    try:
        old = read_json(path)
        rows = [row for row in old["rows"] if "missing" not in row]
        resumed = {"models": old["models"], "checks": old["checks"], "rows": rows}
    except (ValueError, KeyError, TypeError) as e:
        why = f"is no file of ssm-bench {settings['phase']}, and is not overwritten: {e}"
        raise ValueError(f"out: {path} {why}") from e
    for key, value in (settings | {key: facts[key] for key in ("device", "threads", "packages")}).items():
        if old.get(key) != value:
            raise ValueError(f"out: {path} was measured with {key} {old.get(key)}, not {value}; name another file")
    return resumed


class _Session:
    """The points of a command, measured in turn into a result."""

    def __init__(self, command: Prefill, result: dict[str, Any]):
        self.command, self.result = command, result
        self.variants = variants(command)
        self.rows: dict[tuple[int, int, str], Row] = {
            (row["batch"], row["context"], row["model"]): row for row in result["rows"]
        }
        self.known_times: dict[str, tuple[float, float]] = {}
        """Seconds and work of each model's largest point so far."""
        self.models: dict[str, InferenceModel] = {}
        """Models that stay in memory."""
        self.not_installed: dict[str, str] = {}

    def run(self) -> None:
        command, models = self.command, self.result["models"]
        assert command.size is not None and command.dtype is not None  # as of `_with_defaults`
        dtype = DTYPES[command.dtype]
        for name in self.variants:
            spec, quantize = spec_of(command.size, name)
            try:
                spec.check_installed()
            except ModuleNotFoundError as e:
                self.not_installed[name] = str(e)
                continue
            model = build(spec, dtype, "meta", 1, quantize=quantize)
            models[name] = {"parameters": model.parameters, "bytes": model.weight_bytes}
            models[name] |= {"same_size_as": SAME_SIZE.get(name)}
        weights = sum(sum(model["bytes"].values()) for model in models.values())
        # States and activations need the rest of the memory.
        self.keep_models = weights < memory.free_memory(command.device) // 4
        total = len(self.variants) * len(command.batch) * len(command.context)
        with tqdm(total=total, unit="row", file=sys.stderr) as bar, torch.inference_mode():
            for batch in command.batch:
                for context in command.context:
                    bar.set_description(f"batch {batch}, context {context:,}")
                    self.measure_rows(batch, context)
                    write_json(command.out, self.result, quietly=True)
                    bar.update(len(self.variants))

    def measure_rows(self, batch: int, context: int) -> None:
        """Measure the models at a batch and a context, and put their rows in the result."""
        points: list[tuple[Point, Row]] = []
        rows = {}
        for name in self.variants:
            known = self.rows.get((batch, context, name))
            row = rows[batch, context, name] = known or {"model": name, "batch": batch, "context": context}
            if name in self.not_installed:
                row["missing"] = self.not_installed[name]
                continue
            point = self.point(name, batch, context)
            if "time" in row:
                self.known_times[name] = (row["time"]["median"], point.work)
            elif why := self.reason_to_skip(point):
                row["missing"] = why
            else:
                points.append((point, row))
        self.measure_together(points)
        self.rows |= rows
        self.result["rows"] = list(self.rows.values())

    def point(self, name: str, batch: int, context: int) -> Point:
        command = self.command
        assert command.size is not None and command.dtype is not None
        steps = command.steps if isinstance(command, Decode) else 0
        return Point(
            self.result["phase"], command.size, name, batch, context, command.dtype, command.device, steps,
            max_tokens=max(command.context) + WARM_UP + steps + ROUNDS,
            parameters=sum(self.result["models"][name]["parameters"].values()),
        )  # fmt: skip

    def model(self, point: Point) -> InferenceModel:
        """The model of a point; built again each time where all models would take too much memory."""
        if point.model in self.models:
            return self.models[point.model]
        gc.collect()  # reference cycles may still hold the model before
        model = build(point.spec, point.type, point.device, point.max_tokens, quantize=point.quantize)
        if self.keep_models:
            self.models[point.model] = model
        return model

    def reason_to_skip(self, point: Point) -> str | None:
        """The reason why a point is not run, or None. A model is checked before its first point."""
        fitted = point.fitted()
        if isinstance(fitted, str):
            return fitted
        if point.model not in self.known_times or point.model not in self.result["checks"]:
            try:
                checked, seconds, work = measure.check(self.model(point), point)
            except (RuntimeError, MemoryError) as e:
                return out_of_memory(e)
            self.result["checks"][point.model] = checked
            self.known_times.setdefault(point.model, (seconds, work))
        seconds, work = self.known_times[point.model]
        calls = 1 if point.phase == "prefill" else WARM_UP + point.steps_per_round
        # Small points are dominated by overhead: no time is predicted to be below that of the known point.
        predicted = seconds * max(1.0, point.work / work) * calls
        if predicted > self.command.budget:
            return f"skipped: predicted {predicted:,.0f} s, more than the budget of {self.command.budget:g} s"
        return None

    def measure_together(self, points: Sequence[tuple[Point, Row]]) -> None:
        """Measure the points of several models in turn, and complete their rows."""
        found: list[list[Row]] = [[] for _ in points]
        for _ in range(ROUNDS):
            for (point, row), done in zip(points, found, strict=True):
                # No further turn where it would exceed the budget.
                spent = sum(sum(turn["seconds"]) for turn in done)
                if "missing" in row or (done and spent * (len(done) + 1) / len(done) > self.command.budget):
                    continue
                fitted = point.fitted()
                if isinstance(fitted, str):
                    row["missing"] = fitted
                    continue
                try:
                    done.append(measure.run_once(self.model(fitted), fitted))
                    if point.device != "cpu":
                        row["peak_memory"] = done[-1]["peak_memory"]
                    elif "peak_memory" not in row:
                        row["peak_memory"] = measure.peak_memory(fitted)
                except (RuntimeError, MemoryError) as e:
                    row["missing"] = out_of_memory(e)
                    continue
                row["in_prefill_chunks"] = fitted.phase == "prefill" and fitted.chunk < point.tokens
        for (point, row), done in zip(points, found, strict=True):
            if "missing" in row:
                continue
            times = summarize([s for turn in done for s in turn["seconds"]])
            row |= {"time": asdict(times), "tokens": point.tokens, "state_bytes": done[0]["state_bytes"]}
            if point.device == "cpu":
                row["fastest"] = min(s for turn in done for s in turn["core_seconds"])
            if point.phase == "prefill":
                encode = summarize([turn["encode"] for turn in done])
                lm = summarize([s - turn["encode"] for turn in done for s in turn["seconds"]])
                row |= {"encode": asdict(encode), "prompt_tokens_s": point.batch * point.tokens / lm.median}
            else:
                row["tokens_s"] = point.batch / times.median
                if point.device == "cpu":
                    weights = self.result["models"][point.model]["bytes"]["language"]
                    row["bandwidth_share"] = measure.bandwidth_share(weights, row["fastest"])
            self.known_times[point.model] = (times.median, point.work)


def out_of_memory(e: RuntimeError | MemoryError) -> str:
    """The text of a row for an error for want of memory; any other error is raised again.

    PyTorch's allocator on the CPU has no type of error for it: its RuntimeError is recognized by the text.
    """
    by_text = "DefaultCPUAllocator: can't allocate memory" in str(e)
    if isinstance(e, torch.OutOfMemoryError | MemoryError) or by_text:
        return "out of memory"
    raise e
