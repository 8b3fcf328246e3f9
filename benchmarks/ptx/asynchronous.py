"""Translation of the instructions that wait at an mbarrier or use tensor memory: `mbarrier.*`, `tcgen05.*`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .clocks import LOAD, STORE
from .parser import Instruction, Unsupported, many
from .values import BOOL, U4, U8

if TYPE_CHECKING:
    from .translate import Translator


def mbarrier(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "Parallel Synchronization and Communication Instructions: mbarrier"."""
    what = ".".join(i.parts[1:])
    if what == "try_wait.parity.shared::cta.b64" and len(i.operands) == 3:
        to, place, parity = i.operands
        wait = f"block.wait_at_mbarrier({t.address(place, U4)}, {t.read(parity, U4)}, {guard}, {t.at})"
        return t.write(to, wait, BOOL, guard)
    if what == "arrive.shared::cta.b64" and i.operands[0] == "_":
        _, place, *count = i.operands
        count = int(count[0], 0) if count else 1
        return t.emit(f"block.arrive_at_mbarrier({t.address(place, U4)}, {count}, {guard}, {t.at})")
    if what == "init.shared::cta.b64":
        place, count = i.operands
        return t.emit(f"block.initialize_mbarrier({t.address(place, U4)}, {int(count, 0)}, {guard}, {t.at})")
    if what == "inval.shared::cta.b64":
        return t.emit(f"block.invalidate_mbarrier({t.address(i.operands[0], U4)}, {guard}, {t.at})")
    raise Unsupported(f"mbarrier.{what}")


def tcgen05(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "TensorCore 5th Generation Family Instructions"."""
    TCGEN05[i.parts[1]](t, i, guard)


def _require(i: Instruction, *modifiers: str) -> None:
    """Refuse other modifiers than these."""
    if i.parts[2:] != modifiers:
        raise Unsupported(f"modifiers other than .{'.'.join(modifiers)}")


def _allocate(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "Tensor Memory Allocation and Management Instructions": alloc."""
    _require(i, "cta_group::1", "sync", "aligned", "shared::cta", "b32")
    place, columns = _spread(t.address(i.operands[0], U4)), int(i.operands[1], 0)
    t.emit(f"block.tensor_core.allocate({place}, {columns}, {_warps(t, guard)}, {t.at})")


def _free(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "Tensor Memory Allocation and Management Instructions": dealloc."""
    _require(i, "cta_group::1", "sync", "aligned", "b32")
    place, columns = _spread(t.read(i.operands[0], U4)), int(i.operands[1], 0)
    t.emit(f"block.tensor_core.free({place}, {columns}, {_warps(t, guard)}, {t.at})")


def _relinquish(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "Tensor Memory Allocation and Management Instructions": relinquish_alloc_permit."""
    _require(i, "cta_group::1", "sync", "aligned")
    t.emit(f"if {_warps(t, guard)}: block.tensor_core.memory.relinquish()")


def _load(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "Tensor Memory Data Movement Instructions: tcgen05.ld"."""
    _require(i, "sync", "aligned", *i.parts[4:6], "b32")
    to, place, *half_offset = i.operands
    where = f"{_spread(t.address(place, U4))}, {int(half_offset[0], 0) if half_offset else 0}"
    t.emit(f"v = block.tensor_core.load({i.parts[4:6]!r}, {where}, {_warps(t, guard)}, {t.at})")
    for n, register in enumerate(many(to)):
        t.write(register, f"v[{n}]", U4, guard)


def _store(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "Tensor Memory Data Movement Instructions: tcgen05.st"."""
    _require(i, "sync", "aligned", *i.parts[4:6], "b32")
    place, *half_offset, source = i.operands
    where = f"{_spread(t.address(place, U4))}, {int(half_offset[0], 0) if half_offset else 0}"
    registers = t.tuple(many(source), U4)
    t.emit(f"block.tensor_core.store({i.parts[4:6]!r}, {where}, {registers}, {_warps(t, guard)}, {t.at})")


def _wait(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "Tensor Memory Data Movement Instructions: tcgen05.wait"."""
    _require(i, "sync", "aligned")
    engine = {"wait::ld": LOAD, "wait::st": STORE}[i.parts[1]]
    t.emit(f"block.wait_for_tensor_memory({engine}, {guard}, {t.at})")


def _multiply(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "Multiply-and-Accumulate Instructions: tcgen05.mma", dense."""
    kind = i.parts[3]
    _require(i, "cta_group::1", kind)
    if kind not in ("kind::f16", "kind::tf32"):
        raise Unsupported(f".{kind}")
    d, a, b, descriptor, adds = i.operands
    is_tensor_memory = a.startswith("[")
    left = _spread(t.address(a, U4) if is_tensor_memory else t.read(a, U8))
    adds = f"~{t.read(adds[1:], BOOL)}" if adds.startswith("!") else t.read(adds, BOOL)
    operands = ", ".join(
        (_spread(t.address(d, U4)), f"{is_tensor_memory}, {left}", _spread(t.read(b, U8)),
         _spread(t.read(descriptor, U4)), _spread(adds))
    )  # fmt: skip
    t.emit(f"block.tensor_core.multiply({kind!r}, {operands}, block.chosen_threads({guard}).tolist(), {t.at})")


def _commit(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "TensorCore 5th Generation Specialized Synchronization Operations": tcgen05.commit."""
    _require(i, "cta_group::1", "mbarrier::arrive::one", "shared::cluster", "b64")
    (place,) = i.operands  # a second one would be a mask of other blocks
    t.emit(f"block.commit_products({t.address(place, U4)}, {guard}, {t.at})")


def _fence(t: Translator, i: Instruction, guard: str | None) -> None:
    """Section "TensorCore 5th Generation Specialized Synchronization Operations": tcgen05.fence, without effect."""


TCGEN05 = {
    "alloc": _allocate, "dealloc": _free, "relinquish_alloc_permit": _relinquish, "ld": _load, "st": _store,
    "wait::ld": _wait, "wait::st": _wait, "mma": _multiply, "commit": _commit,
    "fence::before_thread_sync": _fence, "fence::after_thread_sync": _fence,
}  # fmt: skip


def _spread(expression: str) -> str:
    """The value of each thread, of an expression that may be one for all."""
    return f"np.broadcast_to({expression}, T)"


def _warps(t: Translator, guard: str | None) -> str:
    """The warps that execute an instruction of whole warps."""
    return f"block.chosen_warps({guard}, {t.at})"
