"""Machine code: what is counted equals what written-out SASS and small kernels execute."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version

import pytest

from ssm_kernels.testing import is_interpreted
from vlmamba.benchmarks import cli
from vlmamba.benchmarks.cases import Case, Shape, published, variants
from vlmamba.benchmarks.compile_report import Request, compile_one, record
from vlmamba.benchmarks.devices import MACHINES
from vlmamba.benchmarks.machine_code.command import count
from vlmamba.benchmarks.machine_code.control import Thread, count_blocks, slice_of_branches
from vlmamba.benchmarks.machine_code.held import HELD, issue_seconds
from vlmamba.benchmarks.machine_code.launches import Launch, Pointer, record_launches
from vlmamba.benchmarks.machine_code.measure import compile_code, duplication, measure, unit_of
from vlmamba.benchmarks.machine_code.memory import origins_of_addresses
from vlmamba.benchmarks.machine_code.pipes import pipe_of, tensor_clocks
from vlmamba.benchmarks.machine_code.report import compare_results, summarize, table_of_changes
from vlmamba.benchmarks.machine_code.sass import parse

compiled = pytest.mark.skipif(is_interpreted(), reason="kernels are compiled, not interpreted")

NESTED = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R2, SR_CTAID.X ;
        /*0020*/                   IMAD.MOV.U32 R3, RZ, RZ, RZ ;
        /*0030*/                   IMAD.MOV.U32 R4, RZ, RZ, RZ ;
        /*0040*/                   FADD R9, R9, 1 ;
        /*0050*/                   VIADD R4, R4, 0x2 ;
        /*0060*/                   ISETP.GE.AND P0, PT, R4, c[0x0][0x214], PT ;
        /*0070*/              @!P0 BRA 0x40 ;
        /*0080*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0090*/                   ISETP.LE.AND P1, PT, R3.reuse, R2, PT ;
        /*00a0*/               @P1 BRA 0x30 ;
        /*00b0*/                   STG.E.64 desc[UR4][R6.64], R8 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
        /*00e0*/                   NOP;
"""


def thread(block: int = 0, constants: dict[int, int] | None = None, **memory: int) -> Thread:
    return Thread((block, 0, 0), 0, constants or {}, lambda address, size: memory.get(f"m{address:x}"))


def executed(text: str, *arguments, **options) -> dict[int, int]:
    """Executions by the address of the first instruction of a block."""
    program = parse(text)
    counts = count_blocks(program, thread(*arguments, **options))
    return {program.of(b)[0].address: n for b, n in sorted(counts.items())}


def line(text: str):
    return parse(f"/*0000*/ {text} ;\n/*0010*/ EXIT ;").instructions[0]


def test_blocks_and_loops():
    program = parse(NESTED)
    assert [program.of(b)[0].address for b in sorted(program.reachable)] == [0x0, 0x30, 0x40, 0x80, 0xB0]
    loops = [({program.of(b)[0].address for b in loop.blocks}) for loop in program.loops]
    assert loops == [{0x30, 0x40, 0x80}, {0x40}]


def test_trips_follow_from_arguments_and_the_program_s_number():
    """Program 2 turns the outer loop three times, each of which turns the inner one ceil(9 / 2) times."""
    assert executed(NESTED, 2, {0x214: 9}) == {0x0: 1, 0x30: 3, 0x40: 15, 0x80: 3, 0xB0: 1}
    assert executed(NESTED, 0, {0x214: 1}) == {0x0: 1, 0x30: 1, 0x40: 1, 0x80: 1, 0xB0: 1}


def test_only_what_decides_branches_is_executed():
    assert {hex(a) for a in slice_of_branches(parse(NESTED))} == {
        "0x10",
        "0x20",
        "0x30",
        "0x50",
        "0x60",
        "0x80",
        "0x90",
    }


def test_trips_that_are_in_a_table():
    """A bound of 64 bits computed from an address, read from memory and shifted."""
    text = """
        /*0000*/ LDC.64 R6, c[0x0][0x210] ;
        /*0010*/ S2R R2, SR_CTAID.X ;
        /*0020*/ LEA R6, P0, R2, R6, 0x4 ;
        /*0030*/ LEA.HI.X.SX32 R7, R2, R7, 0x4, P0 ;
        /*0040*/ LDG.E R3, desc[UR4][R6.64+0x8] ;
        /*0050*/ SHF.R.U32.HI R3, RZ, 0x6, R3 ;
        /*0060*/ IADD3 R3, R3, -0x1, RZ ;
        /*0070*/ ISETP.NE.AND P1, PT, R3, RZ, PT ;
        /*0080*/ @P1 BRA 0x60 ;
        /*0090*/ EXIT ;
    """
    counts = executed(text, 3, {0x210: 0xFFFFFFF0, 0x214: 1}, m200000028=640)  # 0x1fffffff0 + 3 * 16 + 8
    assert counts[0x60] == 10


@pytest.mark.parametrize(
    ("instruction", "registers", "expected"),
    [
        ("IADD3 R2, P0, R4, -R6, RZ", {"R4": 5, "R6": 0}, {"R2": 5, "P0": True}),
        ("IADD3 R2, P0, R4, -R6, RZ", {"R4": 5, "R6": 7}, {"R2": 0xFFFFFFFE, "P0": False}),
        ("IADD3.X R3, R5, ~R7, RZ, P0, !PT", {"R5": 1, "R7": 0, "P0": False}, {"R3": 0}),
        ("IMAD.WIDE R2, R4, -0x2, R6", {"R4": 3, "R6": 1, "R7": 0}, {"R2": 0xFFFFFFFB, "R3": 0xFFFFFFFF}),
        ("IMAD.HI.U32 R2, R4, 0x66666667, RZ", {"R4": 100}, {"R2": 40}),
        ("LEA.HI R2, R4, R5, RZ, 0x1a", {"R4": 640, "R5": 7}, {"R2": 17}),
        ("LOP3.LUT P2, R2, R4, 0xf, RZ, 0xc0, !PT", {"R4": 0x30}, {"R2": 0, "P2": False}),
        ("PLOP3.LUT P0, PT, P1, P2, PT, 0x80, 0x0", {"P1": True, "P2": True}, {"P0": True}),
        ("SHF.R.S32.HI R2, RZ, 0x1f, R4", {"R4": 1 << 31}, {"R2": 0xFFFFFFFF}),
        ("SHF.L.U64.HI R2, R4, 0x4, R5", {"R4": 1 << 31, "R5": 1}, {"R2": 0x18}),
        ("ISETP.GE.U32.AND.EX P0, PT, R4, R5, PT, P1", {"R4": 2, "R5": 2, "P1": False}, {"P0": False}),
        ("ISETP.LT.OR P0, PT, R4, 0x0, P1", {"R4": 0xFFFFFFFF, "P1": False}, {"P0": True}),
        ("VIMNMX R2, R4, 0x3, PT", {"R4": 0xFFFFFFFF}, {"R2": 0xFFFFFFFF}),
        ("VIMNMX R2, PT, PT, R4, 0x3, !PT", {"R4": 9}, {"R2": 9}),
        ("LOP3.LUT R2, R2, 0x40, RZ, 0xfc, !PT", {}, {"R2": 0x40}),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR12], R14", {}, {"P4": True}),
        ("SEL R2, R4, 0x7, !P0", {"R4": 1, "P0": True}, {"R2": 7}),
        ("HFMA2.MMA R2, -RZ, RZ, 0, 5.9604644775390625e-08", {}, {"R2": 1}),
        ("LDCU.128 UR4, c[0x0][0x3e0]", {f"c{0x3E0 + 4 * k}": k + 1 for k in range(4)},
         {f"UR{4 + k}": k + 1 for k in range(4)}),
        ("PRMT R2, R4, 0x7610, R5", {"R4": 0x1234, "R5": 0xABCD0000}, {"R2": 0xABCD1234}),
        ("SGXT R2, R4, 0x4", {"R4": 0xF}, {"R2": 0xFFFFFFFF}),
        ("IABS R2, R4", {"R4": 0xFFFFFFFD}, {"R2": 3}),
        ("FADD R2, R4, R5", {"R4": 1, "R5": 1}, {"R2": None}),
    ],
)  # fmt: skip
def test_instructions_of_a_slice(instruction, registers, expected):
    from vlmamba.benchmarks.machine_code.control import _compile

    state = dict(registers)
    _compile(line(instruction))(state)  # type: ignore[operator]
    assert {name: state.get(name) for name in expected} == expected


def test_a_far_branch_is_written_as_a_call():
    text = """
        /*0000*/ IADD3 R2, R2, 0x1, RZ ;
        /*0010*/ MOV R3, RZ ;
        /*0020*/ IADD3 R3, R3, 0x1, RZ ;
        /*0030*/ ISETP.GE.AND P1, PT, R3, 0x5, PT ;
        /*0040*/ @P1 CALL.REL.NOINC 0x60 ;
        /*0050*/ BRA 0x20 ;
        /*0060*/ EXIT ;
    """
    assert executed(text) == {0x0: 1, 0x20: 5, 0x50: 4, 0x60: 1}


def test_a_loop_that_depends_on_data_is_an_error():
    text = (
        "/*0000*/ LDS R2, [R4] ;\n/*0010*/ ISETP.NE.AND P0, PT, R2, RZ, PT ;\n/*0020*/ @P0 BRA 0x0 ;\n/*0030*/ EXIT ;"
    )
    with pytest.raises(ValueError, match="the end of a loop depends on a value that is unknown: 0x0020 @P0 BRA"):
        executed(text)


def test_a_text_without_instructions_is_an_error():
    with pytest.raises(ValueError, match="no instruction"):
        parse("v_add_f32 v0, v1, v2")


@pytest.mark.parametrize(
    ("instruction", "pipe"),
    [
        ("FFMA R1, R2, R3, R4", "FP32"), ("IMAD.MOV.U32 R1, RZ, RZ, R2", "IMAD"), ("MUFU.EX2 R1, R2", "MUFU"),
        ("LOP3.LUT R1, R2, R3, RZ, 0xc0, !PT", "ALU"), ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "ALU"),
        ("UIADD3 UR4, UR5, 0x1, URZ", "UNI"), ("R2UR UR4, R5", "UNI"), ("LDGSTS.E.BYPASS.128 [R1], [R2.64]", "LDG"),
        ("STG.E.128 desc[UR4][R2.64], R4", "STG"), ("LDSM.16.M88.4 R4, [R1]", "LDS"), ("STL [R1], R2", "STL"),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "SHFL"), ("BAR.SYNC.DEFER_BLOCKING 0x0", "BAR"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "WAIT"), ("HGMMA.64x64x16.F32.BF16 R4, gdesc[UR8], R4", "TENSOR"),
    ],
)  # fmt: skip
def test_pipes(instruction, pipe):
    assert pipe_of(line(instruction)) == pipe


def test_clocks_of_matrix_products():
    """Hopper: four warps multiply (64, 16) by (16, 128) in 64 clocks; Ampere: 1,024 multiply-adds a clock."""
    assert 4 * tensor_clocks(line("HGMMA.64x128x16.F32.BF16 R4, gdesc[UR8], R4")) == 64
    assert tensor_clocks(line("HMMA.16816.F32.BF16 R4, R8, R12, R4")) == 16 * 8 * 16 / 1024


def test_wide_registers():
    assert line("LDG.E.128 R4, desc[UR6][R2.64]").written == {"R4", "R5", "R6", "R7"}
    assert line("IMAD.WIDE R4, R8, 0x2, R10").read == {"R8", "R10", "R11"}
    assert line("HGMMA.64x32x16.F32.BF16 R56, gdesc[UR8], R56, gsb0").written == {f"R{i}" for i in range(56, 72)}
    assert line("@!P3 IADD3 R1, P0, P1, R2, R3, RZ").written == {"R1", "P0", "P1"}
    assert "P3" in line("@!P3 IADD3 R1, P0, P1, R2, R3, RZ").read


def test_an_access_belongs_to_the_argument_that_its_address_comes_from():
    text = """
        /*0000*/ LDC.64 R4, c[0x0][0x218] ;
        /*0010*/ ULDC.64 UR4, c[0x0][0x210] ;
        /*0020*/ IMAD.WIDE R6, R0, 0x2, R4 ;
        /*0030*/ IADD3 R8, P0, R0, UR4, RZ ;
        /*0040*/ IADD3.X R9, RZ, UR5, RZ, P0, !PT ;
        /*0050*/ LDG.E R10, desc[UR8][R6.64] ;
        /*0060*/ STG.E desc[UR8][R8.64], R10 ;
        /*0070*/ EXIT ;
    """
    origins = origins_of_addresses(parse(text), {0x210: 0, 0x214: 0, 0x218: 1, 0x21C: 1})
    assert origins == {0x50: {1}, 0x60: {0}}


def test_of_words_that_are_loaded_together_each_has_its_own_argument():
    """Blackwell loads two pointers, or a pointer and two numbers, at once."""
    text = """
        /*0000*/ LDCU.128 UR4, c[0x0][0x380] ;
        /*0010*/ LDCU.128 UR8, c[0x0][0x390] ;
        /*0020*/ MOV R6, UR6 ;
        /*0030*/ MOV R7, UR7 ;
        /*0040*/ LDG.E R10, desc[UR12][R6.64] ;
        /*0050*/ STG.E desc[UR12][R2.64+UR4], R10 ;
        /*0060*/ UISETP.GE.AND UP0, UPT, UR10, 0x2, UPT ;
        /*0070*/ @UP0 BRA 0x90 ;
        /*0080*/ MOV R20, R21 ;
        /*0090*/ EXIT ;
    """
    program = parse(text)
    pointers = {0x380: 0, 0x384: 0, 0x388: 1, 0x38C: 1, 0x390: 2, 0x394: 2}
    assert origins_of_addresses(program, pointers) == {0x40: {1}, 0x50: {0}}
    words = {0x380: 0, 0x384: 1, 0x388: 0, 0x38C: 2, 0x390: 0, 0x394: 3, 0x398: 5, 0x39C: 9}
    counts = count_blocks(program, Thread((0, 0, 0), 0, words, lambda *at: None))
    assert [program.of(block)[0].address for block in counts] == [0x0, 0x90]
    with pytest.raises(ValueError, match="the argument that the access at 0x0040 goes to is not known"):
        origins_of_addresses(program, {0x380: 0, 0x384: 0})


def test_an_address_that_was_spilled_keeps_its_argument():
    text = """
        /*0000*/ LDC.64 R4, c[0x0][0x218] ;
        /*0010*/ STL.64 [R1+0x8], R4 ;
        /*0020*/ STL [R1], RZ ;
        /*0030*/ MOV R4, RZ ;
        /*0040*/ MOV R5, RZ ;
        /*0050*/ LDL R6, [R1+0x8] ;
        /*0060*/ LDL.LU R7, [R1+0xc] ;
        /*0070*/ STG.E desc[UR8][R6.64], R10 ;
        /*0080*/ EXIT ;
    """
    assert origins_of_addresses(parse(text), {0x218: 1, 0x21C: 1}) == {0x70: {1}}


def test_duplicated_work_shows_in_the_layouts():
    text = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 32, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 16, 16]}>
  %a = ttng.warp_group_dot %c, %b, %d : memdesc * memdesc -> tensor<64x32xf32, #mma1> loc(#loc1)
"""
    assert duplication(text) == 1
    assert duplication(text + "  %s = ttng.warp_group_dot %c, %b : m -> tensor<64x64xf32, #mma> loc(#loc)") == 2


KERNEL = """
import triton
import triton.language as tl

@triton.jit
def walk(x_ptr, table_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    steps = tl.load(table_ptr + tl.program_id(0))
    total = tl.zeros((N,), tl.float32)
    i = 1
    while i < steps:
        total = tl.exp2(total) + tl.load(x_ptr + i * N + at)
        i += i
    tl.store(y_ptr + tl.program_id(0) * N + at, total)
"""


@compiled
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_kernel_is_counted_as_often_as_it_turns(target, tmp_path, monkeypatch):
    """Two programs of two warps that turn 3 and 7 times, one exponential and one load a turn and warp."""
    (tmp_path / "imagined_walk.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    signature = {"x_ptr": "*fp32", "table_ptr": "*i32", "y_ptr": "*fp32", "N": "constexpr"}
    request = Request("imagined_walk", "walk", signature, {(3,): 64}, {}, {"num_warps": 2}, target, "none")
    table = (5).to_bytes(4, "little") + (100).to_bytes(4, "little")
    parameters = (("x", Pointer(4 * 64 * 8, None)), ("table", Pointer(8, table)), ("y", Pointer(4 * 64 * 2, None)))
    found = measure(Launch("fwd", request, (2, 1, 1), parameters), compile_code(request))
    assert found.pipes["MUFU"] == 2 * (3 + 7)
    assert found.pipes["STG"] == 2 * 2
    assert found.pipes["LDG"] == 2 * (3 + 7) + 2 * 2  # and each warp reads the table
    assert found.read["x"] == 4 * 64 * (3 + 7)
    assert found.written["y"] == 4 * 64 * 2
    machine = MACHINES["H100"]
    assert found.traffic(machine)["x"] == (4 * 64 * 8, 0)
    assert found.bounds(machine)["exponentials"] == pytest.approx(20 * 8 / (4 * 132 * 1.7e9))


@compiled
def test_launches_of_a_call_with_their_grids_and_tables():
    case = Case("ssd", Shape(2, 256, heads=4, headdim=64, d_state=64), "bf16")
    recording = record_launches(case, "sm_90")
    modes = [launch.mode for launch in recording.launches]
    assert modes[0] == "fwd" and modes[-1] == "bwd"
    parameters = dict(recording.launches[0].parameters)
    assert parameters["length"] == 256
    segments = parameters["segments"]
    assert isinstance(segments, Pointer) and segments.data is not None
    assert segments.data[:16] == b"".join(n.to_bytes(4, "little") for n in (0, 0, 256, 0))
    assert any(o.name == "sum" for o in recording.operations)


@compiled
def test_units():
    assert unit_of(Case("ssd", Shape(2, 100, heads=4))).count == 800
    assert unit_of(Case("cross_ssd", Shape(2, 100, heads=4, height=10))).count == 4 * 800
    assert unit_of(Case("rms_norm", Shape(2, 100, 64))).count == 400


@compiled
def test_the_command_writes_compares_and_fails_where_a_figure_grew(tmp_path, capsys):
    out = tmp_path / "before.json"
    options = ["machine-code", "add_rms_norm", "--shape", "130m", "--length", "64", "--jobs", "1"]
    cli.main([*options, "--mode", "fwd", "--json", str(out)])
    printed = capsys.readouterr()
    assert "norm._forward_kernel" in printed.out and "bytes a token" in printed.out
    assert "no column of mamba_ssm: mamba_ssm is not installed: " in printed.err
    cli.main([*options, "--mode", "fwd", "--compare", str(out)])
    assert "no figure changed" in capsys.readouterr().out
    found = json.loads(out.read_text())
    (result,) = found["results"]
    moved = result["passes"]["fwd"]["totals"]
    assert moved["launches"] == 1
    # x, weight and the residual are read, the sum and its norm are written.
    assert moved["bytes"] == pytest.approx((2 + 4) * 768 + (2 + 4) * 768 + 2 * 768 / 512, rel=1e-3)
    moved["instructions"] /= 2
    out.write_text(json.dumps(found))
    with pytest.raises(SystemExit) as stopped:
        cli.main([*options, "--mode", "fwd", "--compare", str(out)])
    assert stopped.value.code == 1
    assert "WORSE" in capsys.readouterr().out


@compiled
def test_other_machine_code_is_refused_by_name(capsys):
    with pytest.raises(SystemExit, match="reads SASS, and gfx942 has AMDGCN"):
        cli.main(["machine-code", "add_rms_norm", "--target", "gfx942"])
    with pytest.raises(SystemExit, match="device A100 runs sm_80, and target is sm_90"):
        cli.main(["machine-code", "add_rms_norm", "--device", "A100"])


@compiled
@pytest.mark.slow
def test_shipped_kernels_are_no_worse():
    """SSD and the selective scan of the largest layers on sm_90: launches, instructions, bytes, spills, bounds."""
    held = json.loads(HELD.read_text())
    installed = version("triton")
    if held["packages"]["triton"] != installed:
        pytest.skip(f"the figures are those of Triton {held['packages']['triton']}, and {installed} is installed")
    cases = [case for case in published("bf16", ("2.7b",)) if case.op in ("ssd", "selective_scan")]
    changes = compare_results(held["results"], count(cases))
    assert not any(change.is_worse(0.01) for change in changes), (
        f"{table_of_changes(changes, 0.01)}\n"
        "where it is worth that: ssm-bench machine-code --json benchmarks/results/machine-code.json"
    )


def ssd_layer() -> Case:
    return next(case for case in published("bf16", ("2.7b",)) if case.op == "ssd")


def gated_pack() -> Case:
    pack = variants(ssd_layer())[-1]
    assert pack.z and pack.sequences and pack.initial_states
    return pack


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_ssd_spills_neither_in_float32_nor_in_a_gated_pack(target):
    requests = record([replace(ssd_layer(), dtype="fp32"), gated_pack()], target)
    assert {r.signature["x_ptr"] for r in requests if "x_ptr" in r.signature} >= {"*fp32", "*bf16"}
    assert not [row for row in map(compile_one, requests) if row.problem]


def scan_of_few_channels(batch: int) -> Case:
    case = next(case for case in published("bf16", ("130m",)) if case.op == "selective_scan")
    return replace(case, shape=replace(case.shape, batch=batch))


@compiled
def test_a_scan_that_is_cut_unpacks_b_and_c_once():
    """The first of its passes, which reads them as they are, copies them to float32 for the second."""
    launches = [x.request for x in record_launches(scan_of_few_channels(1), "sm_90").launches if x.mode == "fwd"]
    first, second = (r.signature for r in launches if r.kernel == "_forward_kernel")
    assert (first["B_ptr"], first["B_copy_ptr"], first["C_copy_ptr"]) == ("*bf16", "*fp32", "*fp32")
    assert (second["B_ptr"], second["C_ptr"]) == ("*fp32", "*fp32")


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_few_channels_take_no_more_than_250_instructions(batch):
    """An element of the scan of 130m on sm_90: at batch 8 states are split over lanes, at 1 sequences are cut."""
    (found,) = count([scan_of_few_channels(batch)], modes=("fwd",))
    assert found["passes"]["fwd"]["totals"]["instructions"] <= 250


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["sm_80", "sm_90", *(pytest.param(t, marks=pytest.mark.nightly) for t in ("sm_100", "sm_120"))]
)
def test_a_scan_that_is_cut_does_not_spill(target):
    requests = [r for r in record([scan_of_few_channels(1)], target) if r.kernel == "_forward_kernel"]
    assert len(requests) == 3  # two passes, and the second in training
    assert not [row for row in map(compile_one, requests) if row.problem]


@compiled
@pytest.mark.parametrize(("dtype", "found"), [("bf16", "*bf16"), ("fp16", "*fp32")])
def test_a_gate_leaves_gradients_that_kernels_read_in_bfloat16(dtype, found):
    """In float16 they may exceed its range, and stay in float32."""
    requests = record([replace(gated_pack(), dtype=dtype)], "sm_90")
    assert {r.signature["dy_ptr"] for r in requests if "dy_ptr" in r.signature} == {found}


@pytest.mark.slow
@compiled
def test_shipped_kernels_do_not_spill():
    """The 2.7b models' layers; `make nightly` runs the report, with the same kernels along directions of a grid."""
    requests = record([case for case in published("bf16", ("2.7b",)) if not case.op.startswith("cross_")], "sm_90")
    assert {r.name.split(".")[0] for r in requests} == {"selective_scan", "ssd", "causal_conv1d", "norm", "_triton"}
    assert not [row for row in map(compile_one, requests) if row.problem]


@compiled
def test_the_roofline_shows_the_time_to_start_instructions():
    case = next(case for case in published("bf16", ("2.7b",)) if case.op == "ssd")
    held = next(r for r in json.loads(HELD.read_text())["results"] if r["case"] == str(case))
    seconds = issue_seconds(case, "fwd", "H100")
    assert seconds is not None
    assert seconds == pytest.approx(1e-6 * held["passes"]["fwd"]["totals"]["bounds"]["H100"]["issue"], rel=1e-3)
    smaller = issue_seconds(replace(case, shape=replace(case.shape, heads=24)), "fwd", "H100")
    assert smaller == pytest.approx(seconds * 24 / 80)
    assert issue_seconds(case, "fwd", "MI300X") is None


def test_files_without_a_common_case_do_not_compare():
    with pytest.raises(ValueError, match="in common"):
        compare_results([], [])


def test_a_pass_is_the_sum_of_its_launches():
    assert summarize([], [], unit_of(Case("rms_norm", Shape(1, 1, 32))), MACHINES)["totals"]["launches"] == 0
