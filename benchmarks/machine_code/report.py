"""Figures of a call summed over its launches, as rows of a file, tables, and the comparison of two files."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..devices import Machine
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
    shown = [p for p in PIPES if any(k["pipes"][p] >= 0.05 for k in _kernels(result))]
    devices = list(next(iter(result["passes"].values()))["totals"]["bounds"])
    width = max(len(k["kernel"]) for k in _kernels(result)) + 2
    for mode, one in result["passes"].items():
        head = (
            f"{mode:<{width}}{'n':>3}{'programs':>10}{'warps':>6}{'regs':>5}{'smem':>7}{'blk':>4}{'last':>6}{'dup':>4}"
        )
        head += f"{'instr':>8}" + "".join(f"{p:>{_width(p)}}" for p in shown)
        head += f" |{'turns':>6}{'instr':>6}{'bar':>4}{'shfl':>5}{'wait':>5} |{'bytes':>8}"
        head += "".join(f" | {d + ' us:':<9}{'issue':>7}{'mem':>7}{'exp':>7}{'bound':>7}" for d in devices)
        lines.append(head)
        for k in one["kernels"]:
            turn = k["turn"]
            programs = k["grid"][0] * k["grid"][1] * k["grid"][2]
            line = f"{k['kernel']:<{width}}{k['launches']:>3}{programs:>10}{k['warps']:>6}{k['registers']:>5}"
            line += f"{k['shared']:>7}{k['blocks']:>4}{k['last_round']:>6.0%}{k['duplication']:>4.0f}"
            line += f"{_short(k['instructions']):>8}" + "".join(f"{_short(k['pipes'][p]):>{_width(p)}}" for p in shown)
            line += f" |{k['trips']:>6.0f}{turn['instructions']:>6.0f}{turn['barriers']:>4.0f}{turn['shuffles']:>5.0f}"
            line += f"{turn['waits']:>5.0f} |{k['bytes']:>8.0f}" + _bounds(k["bounds"])
            lines.append(line)
            if k["configuration"]:
                lines.append(f"  {k['configuration']}")
        total = one["totals"]
        line = f"{'total':<{width}}{total['launches']:>3}{'':>42}{_short(total['instructions']):>8}"
        line += "".join(f"{_short(sum(k['pipes'][p] for k in one['kernels'])):>{_width(p)}}" for p in shown)
        lines.append(line + f" |{'':>26} |{total['bytes']:>8.0f}" + _bounds(total["bounds"]))
        large = [f"{name} {b:,.0f}" for name, b in one["tensors"].items() if b >= 0.005 * total["bytes"]]
        if total["operations"]:
            large.append(f"{total['operations']} operations of PyTorch {total['bytes_of_operations']:,.0f}")
        lines += [f"  bytes a token: {', '.join(large)}", ""]
    return "\n".join(lines)


def _kernels(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [k for one in result["passes"].values() for k in one["kernels"]]


def _width(pipe: str) -> int:
    return max(6, len(pipe) + 1)


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _bounds(bounds: dict[str, dict[str, float]]) -> str:
    return "".join(
        f" | {'':<9}{b['issue']:>7.0f}{b['memory']:>7.0f}{b['exponentials']:>7.0f}{b['bound']:>7.0f}"
        for b in bounds.values()
    )


def beside(results: list[dict[str, Any]]) -> str:
    """Totals of the implementations of each case in columns.

    Args:
        results: rows of the file.

    Returns:
        Lines of text.
    """
    lines = []
    for key in dict.fromkeys((r["case"], r["target"]) for r in results):
        same = [r for r in results if (r["case"], r["target"]) == key]
        lines.append(f"{key[0]}, {key[1]}")
        lines.append(f"{'':<42}" + "".join(f"{r['impl']:>12}" for r in same))
        for mode in same[0]["passes"]:
            totals = [r["passes"].get(mode, {}).get("totals") for r in same]
            for figure, name in TOTALS.items():
                if figure != "spills" or any(t and t["spills"] for t in totals):
                    label = f"{mode} {name.format(unit=same[0]['unit'])}"
                    lines.append(f"{label:<42}" + "".join(_cell(t and t[figure]) for t in totals))
            for device in totals[0]["bounds"]:
                cells = "".join(_cell(t and t["bounds"][device]["bound"]) for t in totals)
                lines.append(f"{f'{mode} bound on {device}, us':<42}" + cells)
        lines.append("")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return f"{'-':>12}"
    return f"{value:>12,.1f}" if isinstance(value, float) and value < 1000 else f"{value:>12,.0f}"


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
    lines, name = [], None
    for change in changes:
        if change.name != name:
            name = change.name
            lines.append(name)
        ratio = f"{change.after / change.before:>8.3f}" if change.before else f"{'new':>8}"
        mark = "  WORSE" if change.is_worse(tolerance) else ""
        lines.append(f"  {change.figure:<38}{change.before:>12,.2f}{change.after:>12,.2f}{ratio}{mark}")
    return "\n".join(lines) if lines else "no figure changed"
