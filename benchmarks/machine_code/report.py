"""Figures of a call summed over its launches, as rows of a file, tables, and the comparison of two files."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..devices import Machine
from ..tables import Row, as_text
from .launches import Operation
from .measure import Figures, Unit
from .pipes import PIPES


def summarize(
    figures: Sequence[Figures], operations: Sequence[Operation], unit: Unit, machines: dict[str, Machine]
) -> dict[str, Any]:
    """Figures of one pass as plain data: totals, and a row for each kernel.

    Args:
        figures: launches of the pass, in order.
        operations: operations of PyTorch in the pass.
        unit: the unit of the op.
        machines: devices by name; bytes follow the cache of the first.

    Returns:
        `totals` and `kernels`; instructions a unit, bytes a token, bounds in microseconds.
    """
    groups: dict[tuple[Any, ...], list[Figures]] = collections.defaultdict(list)
    for f in figures:
        groups[f.kernel, f.warps, f.registers, f.shared, f.configuration, tuple(f.turn.values())].append(f)
    kernels = [_row(group, unit, machines) for group in groups.values()]
    first = next(iter(machines.values()))
    moved = [sum(getattr(o, side) for o in operations) / unit.tokens for side in ("read", "written")]
    totals: dict[str, Any] = {
        "launches": len(figures), "operations": len(operations),
        "instructions": sum(row["instructions"] for row in kernels),
        "barriers": sum(row["pipes"]["BAR"] for row in kernels),
        "shuffles": sum(row["pipes"]["SHFL"] for row in kernels),
        "spills": sum(row["spills"] for row in kernels),
        "bytes": sum(row["bytes"] for row in kernels) + sum(moved),
        "bytes_of_operations": sum(moved),
        "bounds": {},
    }  # fmt: skip
    for name, machine in machines.items():
        seconds = {b: sum(f.bounds(machine)[b] for f in figures) for b in ("issue", "memory", "exponentials")}
        seconds["memory"] += sum(moved) * unit.tokens / machine.bandwidth
        # Launches run one after another: the sum of each one's largest bound.
        seconds["bound"] = sum(f.bound(machine)[0] for f in figures) + sum(moved) * unit.tokens / machine.bandwidth
        totals["bounds"][name] = {b: 1e6 * s for b, s in seconds.items()}
    tensors = collections.Counter[str]()
    for f in figures:
        for tensor, both in f.traffic(first).items():
            tensors[tensor] += sum(both) / unit.tokens  # type: ignore[assignment]
    return {"totals": _rounded(totals), "kernels": _rounded(kernels), "tensors": _rounded(dict(tensors.most_common()))}


def _row(group: list[Figures], unit: Unit, machines: dict[str, Machine]) -> dict[str, Any]:
    """One kernel's launches with the same code."""
    f = group[0]
    first = next(iter(machines.values()))
    tensors: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for launch in group:
        for tensor, both in launch.traffic(first).items():
            for i in (0, 1):
                tensors[tensor][i] += both[i] / unit.tokens
    bounds = {}
    for name, machine in machines.items():
        each = [launch.bounds(machine) for launch in group]
        bounds[name] = {bound: 1e6 * sum(e[bound] for e in each) for bound in each[0]}
        bounds[name]["bound"] = 1e6 * sum(launch.bound(machine)[0] for launch in group)
    pipes = {pipe: sum(launch.pipes[pipe] for launch in group) / unit.count for pipe in PIPES}
    return {
        "kernel": f.kernel, "launches": len(group), "grid": list(f.grid), "warps": f.warps, "registers": f.registers,
        "shared": f.shared, "blocks": f.blocks, "duplication": f.duplication, "configuration": f.configuration,
        "last_round": f.last_round(first.num_sms), "rounds": f.rounds(first.num_sms),
        "instructions": sum(pipes.values()), "spills": pipes["LDL"] + pipes["STL"], "pipes": pipes,
        "trips": f.trips, "turn": f.turn, "bytes": sum(sum(both) for both in tensors.values()),
        "tensors": {name: {"read": both[0], "written": both[1]} for name, both in tensors.items()},
        "bounds": bounds,
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def table(result: dict[str, Any]) -> str:
    """Kernels of one implementation of a case, by pass.

    Args:
        result: a row of the file: `case`, `target`, `impl`, `unit` and `passes`.

    Returns:
        Lines of text; several.
    """
    lines = [f"{result['impl']}: {result['case']}, {result['target']}; instructions a {result['unit']}, bytes a token"]
    kernels = [k for one in result["passes"].values() for k in one["kernels"]]
    pipes = [p for p in PIPES if any(k["pipes"][p] >= 0.05 for k in kernels)]
    for mode, one in result["passes"].items():
        total = one["totals"]
        heads = [mode, "n", "programs", "warps", "regs", "smem", "blk", "last", "dup", "instr", *pipes]
        heads += ["turns", "instr", "bar", "shfl", "wait", "bytes"]
        for device in total["bounds"]:
            heads += [f"{device} us: issue", "mem", "exp", "bound"]
        sums = [_short(sum(k["pipes"][p] for k in one["kernels"])) for p in pipes]
        cells = ["total", str(total["launches"]), *[""] * 7, _short(total["instructions"]), *sums]
        cells += [*[""] * 5, f"{total['bytes']:.0f}", *_bounds(total["bounds"])]
        lines.append(as_text(heads, [*(_kernel_row(k, pipes) for k in one["kernels"]), Row(cells)]))
        large = [f"{name} {b:,.0f}" for name, b in one["tensors"].items() if b >= 0.005 * total["bytes"]]
        if total["operations"]:
            large.append(f"{total['operations']} operations of PyTorch {total['bytes_of_operations']:,.0f}")
        lines += [f"  bytes a token: {', '.join(large)}", ""]
    return "\n".join(lines)


def _kernel_row(k: dict[str, Any], pipes: Sequence[str]) -> Row:
    turn = k["turn"]
    sizes = (k["launches"], math.prod(k["grid"]), k["warps"], k["registers"], k["shared"], k["blocks"])
    cells = [k["kernel"], *map(str, sizes), f"{k['last_round']:.0%}", f"{k['duplication']:.0f}"]
    cells += [_short(k["instructions"]), *(_short(k["pipes"][p]) for p in pipes), f"{k['trips']:.0f}"]
    cells += [f"{turn[key]:.0f}" for key in ("instructions", "barriers", "shuffles", "waits")]
    return Row([*cells, f"{k['bytes']:.0f}", *_bounds(k["bounds"])], k["configuration"] or "")


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _bounds(bounds: dict[str, dict[str, float]]) -> list[str]:
    return [f"{b[key]:.0f}" for b in bounds.values() for key in ("issue", "memory", "exponentials", "bound")]


def beside(results: list[dict[str, Any]]) -> str:
    """Totals of the implementations of each case in columns.

    Args:
        results: rows of the file.

    Returns:
        Lines of text.
    """
    parts = []
    for case, target in dict.fromkeys((r["case"], r["target"]) for r in results):
        same = [r for r in results if (r["case"], r["target"]) == (case, target)]
        rows = []
        for mode in same[0]["passes"]:
            totals = [r["passes"].get(mode, {}).get("totals") for r in same]
            for figure, name in TOTALS.items():
                if figure != "spills" or any(t and t["spills"] for t in totals):
                    label = f"{mode} {name.format(unit=same[0]['unit'])}"
                    rows.append(Row([label, *(_cell(t and t[figure]) for t in totals)]))
            for device in totals[0]["bounds"]:
                bounds = (_cell(t and t["bounds"][device]["bound"]) for t in totals)
                rows.append(Row([f"{mode} bound on {device}, us", *bounds]))
        parts.append(f"{case}, {target}\n{as_text(['', *(r['impl'] for r in same)], rows)}\n")
    return "\n".join(parts)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"


TOTALS = {
    "launches": "launches", "operations": "operations of PyTorch", "instructions": "instructions a {unit}",
    "spills": "of them spills", "barriers": "barriers a {unit}", "shuffles": "shuffles a {unit}",
    "bytes": "bytes a token",
}  # fmt: skip
"""Figures of a pass of which less is better."""


@dataclass(frozen=True)
class Change:
    """A figure of a pass that is not what it was."""

    name: str
    figure: str
    before: float
    after: float

    def is_worse(self, tolerance: float) -> bool:
        """Whether the figure grew by more than a relative tolerance."""
        return self.after > self.before * (1 + tolerance) + 1e-9


def compare_results(before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]]) -> list[Change]:
    """Changes of the totals of each pass that both sides have.

    Args:
        before: rows of the earlier file.
        after: rows of the later file.

    Returns:
        The figures that differ, in the order of the later file.

    Raises:
        ValueError: no case, implementation and pass is in both.
    """
    old = {_key(r) + (mode,): one["totals"] for r in before for mode, one in r["passes"].items()}
    changes, common = [], 0
    for r in after:
        for mode, one in r["passes"].items():
            was = old.get(_key(r) + (mode,))
            if was is None:
                continue
            common += 1
            name = f"{r['impl']} {r['case']} {r['target']} {mode}"
            pairs = [(label.format(unit=r["unit"]), was[f], one["totals"][f]) for f, label in TOTALS.items()]
            pairs += [
                (f"bound on {device}, us", was["bounds"][device]["bound"], bounds["bound"])
                for device, bounds in one["totals"]["bounds"].items()
                if device in was["bounds"]
            ]
            changes += [Change(name, label, a, b) for label, a, b in pairs if a != b]
    if not common:
        raise ValueError("the files have no case, implementation and pass in common")
    return changes


def _key(result: dict[str, Any]) -> tuple[str, ...]:
    return result["impl"], result["case"], result["target"]


def table_of_changes(changes: list[Change], tolerance: float) -> str:
    """Changes as text, those that are worse beyond the tolerance marked."""
    if not changes:
        return "no figure changed"
    rows = []
    for change in changes:
        ratio = f"{change.after / change.before:.3f}" if change.before else "new"
        cells = (change.name, change.figure, f"{change.before:,.2f}", f"{change.after:,.2f}", ratio)
        rows.append(Row(cells, "WORSE" * change.is_worse(tolerance)))
    return as_text(("pass", "figure", "before", "after", "ratio"), rows, names=(0, 1))
