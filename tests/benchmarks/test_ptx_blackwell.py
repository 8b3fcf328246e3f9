"""The emulator's instructions of sm_100 and later: arithmetic, reductions, mbarriers, tensor memory and products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.benchmarks.handwritten import run_ptx
from vlmamba.benchmarks.ptx import Fault, Unsupported
from vlmamba.benchmarks.ptx.matrix import SharedTile, accumulator_elements
from vlmamba.benchmarks.ptx.tcgen05 import Product
from vlmamba.benchmarks.ptx.tensor_memory import fragment

pytestmark = pytest.mark.ptx

# ---- arithmetic ------------------------------------------------------------------------------------------------------

LOAD_FOUR = "\n".join(f"ld.global.b32 %r{4 + n}, [%rd3+{256 * n}];" for n in range(4))
PACKED = {
    "add.rn.f32x2": lambda a, b: a + b,
    "sub.f32x2": lambda a, b: a - b,
    "mul.f32x2": lambda a, b: a * b,
    "fma.rn.f32x2": lambda a, b: a.double() * b + a,
}


@pytest.mark.parametrize("opcode", PACKED)
def test_packed_arithmetic_is_that_of_its_halves(opcode):
    out = torch.randn(4, 64)
    low, high = PACKED[opcode](out[0], out[2]).float(), PACKED[opcode](out[1], out[3]).float()
    third = ", %rd4" if opcode.startswith("fma") else ""
    run_ptx(
        f"{LOAD_FOUR}\nmov.b64 %rd4, {{%r4, %r5}};\nmov.b64 %rd5, {{%r6, %r7}};\n{opcode} %rd6, %rd4, %rd5{third};\n"
        "mov.b64 {%r8, %r9}, %rd6;\nst.global.b32 [%rd3], %r8;\nst.global.b32 [%rd3+256], %r9;",
        out,
    )
    assert torch.equal(out[0], low) and torch.equal(out[1], high)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mixed_arithmetic_widens_all_but_its_last_operand(kind):
    out = torch.randn(3, 64)
    a, b = (x.to(torch.bfloat16 if kind == "bf16" else torch.float16).double() for x in out[:2])
    c = out[2].double().clone()
    narrow = "\n".join(f"cvt.rn.{kind}.f32 %rs{n}, %r{3 + n};" for n in (1, 2))
    run_ptx(
        f"{LOAD_FOUR[: LOAD_FOUR.rindex('ld')]}\n{narrow}\nfma.rn.f32.{kind} %r7, %rs1, %rs2, %r6;\n"
        f"add.rn.f32.{kind} %r8, %rs1, %r6;\nsub.rn.f32.{kind} %r9, %rs1, %r6;\n"
        "st.global.b32 [%rd3], %r7;\nst.global.b32 [%rd3+256], %r8;\nst.global.b32 [%rd3+512], %r9;",
        out,
    )
    assert torch.equal(out, torch.stack([a * b + c, a + c, a - c]).float())


REDUCTIONS = {
    "max.f32": lambda rows: rows.nan_to_num(-torch.inf).amax(1),
    "min.abs.f32": lambda rows: rows.abs().nan_to_num(torch.inf).amin(1),
    "max.NaN.f32": lambda rows: rows.amax(1),
    "add.s32": lambda rows: rows.view(torch.int32).sum(1).int().view(torch.float32),
    "xor.b32": lambda rows: torch.from_numpy(np.bitwise_xor.reduce(rows.numpy().view(np.int32), 1)).view(torch.float32),
}


@pytest.mark.parametrize("opcode", REDUCTIONS)
def test_a_reduction_is_that_of_each_warp(opcode):
    out = torch.randn(64)
    if "f32" in opcode:
        out[40] = torch.nan
    want = REDUCTIONS[opcode](out.view(2, 32)).repeat_interleave(32)
    run_ptx(f"ld.global.b32 %r4, [%rd3];\nredux.sync.{opcode} %r5, %r4, -1;\nst.global.b32 [%rd3], %r5;", out)
    assert np.array_equal(out.numpy().view(np.int32), want.numpy().view(np.int32)) or (
        "NaN" in opcode and out[32:].isnan().all() and torch.equal(out[:32], want[:32])
    )


# ---- mbarriers -------------------------------------------------------------------------------------------------------

WAIT = """{{ .reg .pred complete;
waitLoop:
mbarrier.try_wait.parity.shared::cta.b64 complete, [%r4], {parity};
@!complete bra.uni waitLoop; }}
"""
INITIALIZE = """setp.eq.u32 %p1, %r2, 0;
mov.u32 %r4, 512;
@%p1 mbarrier.init.shared::cta.b64 [%r4], {count};
bar.sync 0;
"""
EXCHANGE = """xor.b32 %r5, %r3, 128;
ld.shared.b32 %r6, [%r5];
st.global.b32 [%rd3], %r6;"""


def exchange(wait: str, count: int = 64) -> str:
    """Warps exchange what they wrote, after all threads arrived at an mbarrier."""
    arrive = "st.shared.b32 [%r3], %r2;\nmbarrier.arrive.shared::cta.b64 _, [%r4];\n"
    return INITIALIZE.format(count=count) + arrive + wait + EXCHANGE


def test_a_wait_at_an_mbarrier_orders_what_came_before_the_arrivals():
    out = torch.zeros(64, dtype=torch.int32)
    assert not run_ptx(exchange(WAIT.format(parity=0)), out)[0]
    assert out.tolist() == [i ^ 32 for i in range(64)]
    found, *_ = run_ptx(exchange(""), out)
    assert any("with no barrier between" in what for what in found)
    # The phase before the first has completed: its parity is 1.
    store = "st.shared.b32 [%r3], %r2;\n"
    found, *_ = run_ptx(INITIALIZE.format(count=64) + store + WAIT.format(parity=1) + EXCHANGE, out)
    assert any("with no barrier between" in what for what in found)


def test_a_wait_for_arrivals_that_never_come_is_a_fault():
    with pytest.raises(Fault, match="wait at mbarriers"):
        run_ptx(exchange(WAIT.format(parity=0), count=65), torch.zeros(64))


def test_a_warp_may_wait_for_one_that_comes_later():
    """Warp 1 waits before warp 0, which has more to do, has arrived."""
    body = INITIALIZE.format(count=32) + (
        "setp.ge.u32 %p2, %r2, 32;\n@%p2 bra $L_wait;\nmov.u32 %r7, 3;\n$L_work:\nst.shared.b32 [%r3], %r2;\n"
        "sub.u32 %r7, %r7, 1;\nsetp.ne.u32 %p3, %r7, 0;\n@%p3 bra $L_work;\n"
        "mbarrier.arrive.shared::cta.b64 _, [%r4];\n$L_wait:\n" + WAIT.format(parity=0) + "and.b32 %r5, %r3, 127;\n"
        "ld.shared.b32 %r6, [%r5];\nst.global.b32 [%rd3], %r6;"
    )
    out = torch.zeros(64, dtype=torch.int32)
    found, _, diverged = run_ptx(body, out)
    assert not found and diverged and out.tolist() == 2 * list(range(32))


@pytest.mark.parametrize(
    "body, fault",
    [
        ("mbarrier.arrive.shared::cta.b64 _, [%r3];", "no mbarrier is at"),
        (INITIALIZE.format(count=1) + "@%p1 mbarrier.init.shared::cta.b64 [%r4], 1;", "mbarrier.inval comes first"),
        (INITIALIZE.format(count=0), "an mbarrier of 0 arrivals"),
        (INITIALIZE.format(count=2) + "mbarrier.arrive.shared::cta.b64 _, [%r4], 3;", "3 arrivals at an mbarrier that"),
        (INITIALIZE.format(count=1).replace("512", "516"), "misaligned"),
    ],
)
def test_a_wrong_use_of_an_mbarrier_is_a_fault(body, fault):
    with pytest.raises(Fault, match=fault):
        run_ptx(body, torch.zeros(64))


def test_ordinary_accesses_to_an_mbarrier_are_noticed_until_it_is_invalidated():
    store = "@%p1 st.shared.b32 [%r4], 1;"
    found, *_ = run_ptx(INITIALIZE.format(count=1) + store, torch.zeros(64))
    assert any("writes to an mbarrier" in what for what in found)
    invalidate = "@%p1 mbarrier.inval.shared::cta.b64 [%r4];\n"
    assert not run_ptx(INITIALIZE.format(count=1) + invalidate + store, torch.zeros(64))[0]
    found, *_ = run_ptx(exchange(WAIT.format(parity=0)) + invalidate, torch.zeros(64))
    assert any("read by one warp and written by another" in what for what in found)  # a warp may wait still


# ---- tensor memory ---------------------------------------------------------------------------------------------------

ALLOCATE = """setp.lt.u32 %p1, %r2, 32;
mov.u32 %r4, 0;
@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4], 64;
bar.sync 0;
ld.shared.b32 %r5, [0];
bar.sync 0;
and.b32 %r6, %r2, 96;
shl.b32 %r6, %r6, 16;
add.u32 %r7, %r5, %r6;
""".replace("[0]", "[global_smem]")
FREE = "bar.sync 0;\n@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r5, 64;"
STORE = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r7], {%r2};\n"
STORED = "tcgen05.wait::st.sync.aligned;\n"
LOAD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r8}, [%r7];\n"
LOADED = "tcgen05.wait::ld.sync.aligned;\n"


def run_tensor(body: str) -> tuple[dict[str, int], list[int]]:
    """Findings of a kernel of four warps, and %r8 of all threads."""
    out = torch.zeros(128, dtype=torch.int32)
    found, *_ = run_ptx(ALLOCATE + body + FREE + "\nst.global.b32 [%rd3], %r8;", out, threads=128)
    return found, out.tolist()


def test_tensor_memory_holds_what_was_stored():
    assert run_tensor(STORE + STORED + LOAD + LOADED) == ({}, list(range(128)))


@pytest.mark.parametrize(
    "body, finding",
    [
        (STORE + LOAD + LOADED + STORED, "read before the tcgen05.wait::st"),
        (STORE + STORED + LOAD + STORE + STORED + LOADED, "written before the tcgen05.wait::ld"),
        (STORE + STORED + LOAD, "loaded by one warp and freed by another"),
        (LOAD + LOADED, "never written"),
    ],
)
def test_accesses_to_tensor_memory_that_are_not_waited_for_are_noticed(body, finding):
    found, values = run_tensor(body)
    assert any(finding in what for what in found), found
    assert "read" not in finding or values == [-1] * 128  # NaN


def test_a_barrier_orders_stores_and_loads_of_warps_with_the_same_lanes():
    """Warp 4 has the lanes of warp 0."""
    body = "setp.lt.u32 %p2, %r2, 128;\nmov.u32 %r8, 0;\nand.b32 %r9, %r6, 0x600000;\nadd.u32 %r7, %r5, %r9;\n"
    for between in ("bar.sync 0;\n", ""):
        out = torch.zeros(256, dtype=torch.int32)
        text = ALLOCATE + body + f"@%p2 {STORE}{STORED}{between}@!%p2 {LOAD}{LOADED}{FREE}\nst.global.b32 [%rd3], %r8;"
        found, *_ = run_ptx(text, out, threads=256)
        if between:
            assert not found and out.tolist() == [0] * 128 + list(range(128))
        else:
            assert any("stored by one warp and read by another" in what for what in found)


@pytest.mark.parametrize(
    "body, fault",
    [
        (ALLOCATE, "ends with 64 columns of tensor memory allocated"),
        (ALLOCATE + FREE.replace("64", "32"), "no allocation of 32 columns"),
        (ALLOCATE.replace("64;", "48;"), "48 columns"),
        (ALLOCATE + "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r4], 512;", "are not free"),
        ("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;\n" + ALLOCATE, "after tcgen05.relinquish"),
        (
            ALLOCATE + STORE.replace("x1", "x2").replace("{%r2}", "{%r2, %r2}").replace("%r7", "%r7+63") + FREE,
            "not one",
        ),
        (ALLOCATE + STORE.replace("%r7", "%r5") + FREE, "its lanes start at 32"),
        (ALLOCATE + FREE + "\n" + LOAD, "not one allocation"),
        (ALLOCATE + "setp.eq.u32 %p2, %r2, 0;\n@%p2 " + STORE + FREE, "a part of a warp"),
    ],
)
def test_a_wrong_use_of_tensor_memory_is_a_fault(body, fault):
    with pytest.raises(Fault, match=fault):
        run_ptx(body, torch.zeros(128), threads=128)


@pytest.mark.parametrize("shape, lanes, columns", [
    ("32x32b", 32, 4), ("16x32bx2", 16, 8), ("16x128b", 16, 16), ("16x256b", 16, 32),
])  # fmt: skip
def test_a_fragment_holds_each_word_once(shape, lanes, columns):
    lane, column = fragment(shape, "x4", 4)
    places = set(zip(lane.ravel().tolist(), column.ravel().tolist(), strict=True))
    assert places == {(i, j) for i in range(lanes) for j in range(columns)} and len(places) == lane.size


def test_a_fragment_of_256_bits_is_that_of_the_accumulators_of_wgmma():
    lane, column = fragment("16x256b", "x2", 0)
    for r in range(8):
        rows, columns = accumulator_elements(r)
        assert np.array_equal(lane[:, r], rows) and np.array_equal(column[:, r], columns)


# ---- products --------------------------------------------------------------------------------------------------------

BF16_64 = 1 << 4 | 1 << 7 | 1 << 10 | 64 >> 3 << 17 | 64 >> 4 << 24
"""Instruction descriptor of bfloat16, M 64 and N 64, both operands contiguous along K."""


def test_an_instruction_descriptor_names_the_product():
    assert Product.decode(BF16_64, "kind::f16") == Product(64, 64, "bf16", (1, 1), (True, True))
    negated = Product.decode(BF16_64 | 1 << 13 | 1 << 16, "kind::f16")
    assert negated.signs == (-1, 1) and negated.k_major == (True, False)
    tf32 = 1 << 4 | 2 << 7 | 2 << 10 | 256 >> 3 << 17 | 128 >> 4 << 24
    assert Product.decode(tf32, "kind::tf32") == Product(128, 256, "tf32", (1, 1), (True, True))
    with pytest.raises(Fault, match="M 64 and N 0"):
        Product.decode(BF16_64 & ~(64 >> 3 << 17), "kind::f16")
    for other in (BF16_64 | 1 << 2, BF16_64 & ~(1 << 4), BF16_64 & ~(1 << 7)):  # sparse; sums, and A, in float16
        with pytest.raises(Unsupported, match="instruction descriptor"):
            Product.decode(other, "kind::f16")


@pytest.mark.parametrize("of_wgmma, of_tcgen05", [(0, 0), (1, 2), (2, 4), (3, 6)])
def test_descriptors_of_both_generations_place_the_same_tile(of_wgmma, of_tcgen05):
    place = 0x40 | 0x10 << 16 | 0x20 << 32
    tile = SharedTile.of_tcgen05(place | 1 << 46 | of_tcgen05 << 61)
    assert tile == SharedTile.of_wgmma(place | of_wgmma << 62)
    assert (tile.start, tile.leading, tile.stride) == (0x400, 0x100, 0x200)


def test_descriptors_with_other_layouts_are_refused():
    for bits in (1 << 46 | 1 << 61, 1 << 46 | 1 << 52, 0):  # 32-byte atoms; an absolute leading dimension; no version
        with pytest.raises(Unsupported, match="shared memory descriptor"):
            SharedTile.of_tcgen05(bits)


PRODUCT = """mov.u32 %r9, 3072;
{stores}
{fence}
setp.eq.u32 %p2, %r2, 0;
@%p2 mbarrier.init.shared::cta.b64 [%r9], 1;
bar.sync 0;
mov.pred %p3, 0;
mov.b64 %rd4, {descriptor};
mov.u32 %r11, {instruction};
@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r5], %rd4, %rd4, %r11, %p3;
@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r9];
{wait}
{after}
tcgen05.ld.sync.aligned.16x32bx2.x32.b32 {{{registers}}}, [%r7], 32;
tcgen05.wait::ld.sync.aligned;
"""
FENCE = "fence.proxy.async.shared::cta;"


def run_product(*, fence: str = FENCE, wait: str | None = None, after: str = "", instruction: int = BF16_64):
    """The product of a 64 x 16 matrix in shared memory and its transpose, and the findings.

    Without a swizzle: core matrices of 8 rows of 16 bytes, 128 bytes apart along M and N, 1024 along K.
    """
    matrix = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    tiles = matrix.view(8, 8, 2, 8).permute(2, 0, 1, 3).contiguous()  # (K / 8, M / 8, 8, 8)
    out = torch.zeros(128 * 33, dtype=torch.int32)
    out[:512] = tiles.view(torch.int32).reshape(-1)
    stores = "\n".join(
        f"ld.global.b32 %r12, [%rd3+{512 * n}];\nadd.u32 %r13, %r3, {512 * n + 16};\nst.shared.b32 [%r13], %r12;"
        for n in range(4)
    )
    if wait is None:
        wait = WAIT.format(parity=0).replace("%r4", "%r9")
    descriptor = 16 >> 4 | 1024 >> 4 << 16 | 128 >> 4 << 32 | 1 << 46
    registers = ", ".join(f"%r{20 + n}" for n in range(32))
    body = PRODUCT.format(
        stores=stores, fence=fence, wait=wait, after=after, descriptor=descriptor, instruction=instruction,
        registers=registers,
    )  # fmt: skip
    results = "\n".join(f"st.global.b32 [%rd3+{512 * (n + 1)}], %r{20 + n};" for n in range(32))
    found, *_ = run_ptx(ALLOCATE + body + FREE + "\n" + results, out, threads=128, shared=4096)
    rows = out[128:].view(torch.float32).view(32, 4, 2, 16)  # (register, warp, half, lane)
    product = rows.permute(1, 3, 2, 0).reshape(64, 64)
    return found, product, matrix.double() @ matrix.double().T


def test_a_product_is_that_of_torch():
    found, got, want = run_product()
    assert not found
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    _, negated, _ = run_product(instruction=BF16_64 | 1 << 14)
    assert torch.equal(negated, -got)


def test_a_product_that_is_not_waited_for_is_noticed_and_its_results_are_nan():
    found, got, _ = run_product(wait="")
    assert any("read while a tcgen05.mma that writes it is in flight" in what for what in found)
    assert got.isnan().all()


def test_a_product_without_a_fence_after_the_stores_of_its_operands_is_noticed():
    found, *_ = run_product(fence="")
    assert any(
        "tcgen05.mma reads memory that generic-proxy stores wrote, with no proxy fence" in what for what in found
    )


def test_operands_that_are_overwritten_during_a_product_are_noticed():
    overwrite, late = "st.shared.b32 [%r13], %r12;\n", WAIT.format(parity=0).replace("%r4", "%r9")
    found, *_ = run_product(wait="", after=overwrite + late)
    assert any("written while a tcgen05.mma that reads it is in flight" in what for what in found)
    assert not run_product(after=overwrite)[0]


def test_a_product_that_reads_as_its_operand_what_another_one_writes_is_noticed():
    second = "@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r5], [%r5], %rd4, %r11, %p3;\n"
    found, *_ = run_product(wait="", after=second)
    assert any("reads as A what another one in flight writes" in what for what in found)
    found, *_ = run_product(after=second)
    assert not any("reads as A" in what for what in found)
