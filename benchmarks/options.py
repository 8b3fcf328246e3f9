"""Options of the `ssm-bench` commands. Nothing here imports torch, so that help and mistakes are answered at once.

A command is a dataclass: its fields are the options, its docstring is the help, and `run` imports what does the work.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from ..model.fields import Count, Interval, Seed

Positional = tyro.conf.Positional
Span = Annotated[float, Interval("(0, inf]")]
"""A length of time; inf waits for ever."""

Op = Literal[
    "selective_scan", "ssd", "causal_conv1d", "rms_norm", "add_rms_norm", "cross_scan", "cross_merge",
    "cross_causal_conv1d", "cross_selective_scan", "cross_ssd", "selective_scan_step", "ssd_step",
    "causal_conv1d_step", "mamba_block", "mamba2_block",
]  # fmt: skip
OPS: tuple[str, ...] = tuple(op for op in get_args(Op) if not op.endswith("_block"))
"""The ops of `ssm_kernels`; a block is a whole mixer."""
Impl = Literal["ours", "triton", "torch", "reference", "mamba_ssm", "causal_conv1d", "fla", "transformers"]
Metric = Literal["time", "memory", "error"]
Mode = Literal["fwd", "bwd", "fwd+bwd"]
Dtype = Literal["fp32", "fp64", "bf16", "fp16"]
EmulatedTarget = Literal["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
ShapeName = Literal["default", "130m", "370m", "790m", "1.3b", "2.7b", "vision", "long"]
ModelType = Literal[
    "mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "bamba", "zamba2", "nemotron_h", "granitemoehybrid",
    "falcon_h1",
]  # fmt: skip
Size = Literal["published", "small"]
Model = Literal[
    "vl-mamba", "transformer-siglip", "ml-mamba", "ml-mamba-on-mamba1", "transformer-dinov2-siglip", "tinyllava",
    "mobilevlm-v2",
]  # fmt: skip
MODELS: tuple[Model, ...] = (
    "vl-mamba", "transformer-siglip", "ml-mamba", "ml-mamba-on-mamba1", "transformer-dinov2-siglip", "tinyllava",
    "mobilevlm-v2",
)  # fmt: skip


def _processors() -> int:
    """Processors that this process may use; macOS does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Run:
    """Measure implementations of an op side by side: time, error, and peak memory of the process.

    Ops are those of ssm_kernels; a block is a whole mixer. The error of y is against the step-by-step reference in
    float64, or, where that would take long, the torch backend in float64; that of gradients against the latter. Exit
    status 1 if an implementation is wrong. A peer that is not installed has a line that says so.
    """

    op: Positional[Op]
    impl: tuple[Impl, ...] = ("ours", "transformers")
    """ours is what `backend="auto"` takes: triton on a GPU and torch elsewhere. triton on a CPU runs in its
    interpreter, with TRITON_INTERPRET=1. transformers is what that library runs where no kernels are installed."""
    mode: tuple[Mode, ...] = ()
    """bwd is the backward alone. By default fwd and fwd+bwd; a decoding step has fwd alone."""
    metric: tuple[Metric, ...] = ("time", "memory", "error")
    dtype: Dtype = "fp32"
    device: str = "cpu"
    """cuda, or one of several such as cuda:1."""
    shape: tuple[ShapeName, ...] = ("default",)
    """One or more, a table each: a published model's layer at batch 8 and length 2,048; vision: 2.7b on an image's 729
    patches; long: 130m over 65,536 steps."""
    batch: Count | None = None
    """Sizes; those not given are the shape's."""
    length: Count | None = None
    channels: Count | None = None
    d_state: Count | None = None
    heads: Count | None = None
    headdim: Count | None = None
    groups: Count | None = None
    width: Count | None = None
    """Of the convolution."""
    height: Count | None = None
    """Rows of the grid, of which `length` is the area."""
    chunk_size: Count | None = None
    """Of our SSD; peers keep their own."""
    calls: Count = 15
    """Timed calls an implementation; one that takes more than five seconds is called once."""
    out: Path | None = None
    """JSON file to write; beside it go a table as .csv, a plot as .png, and all of it in one .html."""

    def run(self) -> None:
        from .run import run_run

        run_run(self)


@dataclass
class Sweep:
    """Measure an op against its length (a scan's time grows in proportion), or another size, and plot it.

    Errors and exit status as those of `run`, at every size.
    """

    op: Positional[Op]
    impl: tuple[Impl, ...] = ("ours",)
    """As in `run`."""
    mode: tuple[Mode, ...] = ()
    """By default fwd+bwd; of a decoding step fwd."""
    metric: tuple[Metric, ...] = ("time", "error")
    dtype: Dtype = "fp32"
    device: str = "cpu"
    shape: ShapeName = "default"
    """The sizes that are not swept, as in `run`, but one sequence where no batch is given."""
    lengths: tuple[Count, ...] = ()
    """By default 1,024 to 65,536 by doubling, where no other size is swept."""
    batches: tuple[Count, ...] = ()
    d_states: tuple[Count, ...] = ()
    chunk_sizes: tuple[Count, ...] = ()
    """Of our SSD; peers keep their own."""
    batch: Count = 1
    length: Count | None = None
    channels: Count | None = None
    d_state: Count | None = None
    heads: Count | None = None
    headdim: Count | None = None
    groups: Count | None = None
    width: Count | None = None
    height: Count | None = None
    chunk_size: Count | None = None
    calls: Count = 5
    """Timed calls an implementation and size; one that takes more than five seconds is called once."""
    patience: Span = 30.0
    """Seconds; an implementation whose call took longer is left out at larger sizes."""
    out: Path = Path("sweep.json")
    """JSON file to write; beside it go a table as .csv, a plot as .png, and all of it in one .html."""

    def run(self) -> None:
        from .run import run_sweep

        run_sweep(self)


@dataclass
class Bridge:
    """Time transformers' models with and without enable(): what a step of training gains from these ops.

    Same weights, in turn; differences of logits and gradients beside the times, from transformers' own. Exit status 1
    if they do not agree.
    """

    model_type: Positional[tuple[ModelType, ...]] = ("mamba", "mamba2")
    mode: tuple[Mode, ...] = ("fwd", "fwd+bwd")
    """bwd is the backward alone."""
    length: Count = 1024
    batch: Count = 1
    width: Count = 768
    """Of the residual stream; the state-space layers' inner width is twice that."""
    layers: Count = 1
    dtype: Dtype = "fp32"
    device: str = "cpu"
    calls: Count = 5
    """Timed calls a side; one that takes more than five seconds, as transformers' own Mamba does, is called once."""
    out: Path | None = None
    """JSON file to write; beside it go a table as .csv, a plot as .png, and all of it in one .html."""

    def run(self) -> None:
        from .bridge import run_bridge

        run_bridge(self)


@dataclass
class Roofline:
    """Print what each op must move and compute at the published sizes, the least time for it, and what bounds it."""

    op: Positional[tuple[str, ...]] = OPS
    size: tuple[Literal["130m", "370m", "790m", "1.3b", "2.7b"], ...] = ("2.7b",)
    """Models of Mamba and Mamba-2; the connectors' ops are those of 2.7b."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    device: tuple[Literal["A100", "H100", "H200", "B200", "MI300X", "L40S", "RTX 4090"], ...] = ("H100",)
    out: Path | None = None
    """JSON file to write."""

    def run(self) -> None:
        from .commands import run_roofline

        run_roofline(self)


@dataclass
class CompileReport:
    """Compile what the ops would launch, with no GPU; exit status 1 if a kernel spills or asks for too much memory."""

    op: Positional[tuple[str, ...]] = OPS
    target: tuple[Literal["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"], ...] = ()
    """By default every shipped configuration for sm_80, sm_90, sm_100 and gfx942, and, since their shared memory is
    smaller, the 2.7b models for sm_89 and sm_120."""
    quick: bool = False
    """The 2.7b models in bf16 alone, and, where no target is given, sm_90."""
    jobs: Count = _processors()
    """Processes."""
    out: Path | None = None
    """JSON file to write; the table goes beside it as .txt."""

    def run(self) -> None:
        from .commands import run_compile_report

        run_compile_report(self)


@dataclass
class Compare:
    """Hold a later file of `run` or `sweep` against an earlier one; exit status 1 if one is slower, not by chance.

    By Mann and Whitney's test of the single calls' times, with Holm's correction for how many rows there are.
    """

    before: Positional[Path]
    after: Positional[Path]
    threshold: Annotated[float, Interval("[0, inf)")] = 0.05
    """Medians that are slower by a smaller share are no regression."""
    alpha: Annotated[float, Interval("(0, 1)")] = 0.01
    """How likely chance may be."""
    relative_to: str | None = None
    """An implementation in both files that did not change: times as multiples of its, free of the machine's drift."""

    def run(self) -> None:
        from .commands import run_compare

        run_compare(self)


@dataclass
class Verify:
    """Hold a function of one's own against the reference at every option; exit status 1 if it is wrong.

    It has the op's signature, without `backend`: arguments by name. One that it does not name is not tested, and
    said not to be, as is a case at which it raises NotImplementedError. It gives what the op gives, or y alone.
    Gradients are compared where its results carry them.
    """

    op: Positional[str]
    kernel: str
    """path.py:function."""
    dtype: tuple[Dtype, ...] = ("fp32", "bf16")
    device: str = "cpu"
    ptx: EmulatedTarget | None = None
    """Compile its Triton kernels for this GPU, and emulate them on CPU tensors: with no GPU."""

    def run(self) -> None:
        from .commands import run_verify

        run_verify(self)


@dataclass
class Emulate:
    """Run the kernels of the ops as compiled for a GPU, in an emulator on this CPU; exit status 1 if one is wrong.

    Every access is checked: races between warps and between programs, missing waits and fences, accesses outside the
    tensors. Compiling takes 1 to 70 s a kernel the first time; Triton keeps what it compiled.
    """

    op: Positional[tuple[str, ...]] = OPS
    target: tuple[EmulatedTarget, ...] = ("sm_90",)
    dtype: tuple[Dtype, ...] = ("bf16",)
    tiles: Literal["small", "published"] = "small"
    """published: head and state sizes of the published models."""
    plain: bool = False
    """The plain call of each op alone, without its options."""
    out: Path | None = None
    """JSON file to write."""

    def run(self) -> None:
        from .emulate import run_emulate

        run_emulate(self)


@dataclass
class Fuzz:
    """Random calls, extreme values among them, of every backend against the reference; exit status 1 if one is wrong.

    Backends: torch, and triton on a GPU or, with TRITON_INTERPRET=1, in its interpreter.
    """

    minutes: Span = 1.0
    seed: Seed | None = None
    """Of the first trial; the next have the numbers that follow. By default another one each time."""
    trials: Count | None = None
    """How many at most; 1 repeats the trial of a seed."""
    op: tuple[str, ...] = OPS
    device: str = "cpu"
    out: Path | None = None
    """JSON file to write."""

    def run(self) -> None:
        from .commands import run_fuzz

        run_fuzz(self)


@dataclass
class GPUSuite:
    """On a GPU: is every op right, how fast is it, and beside whom. Ten minutes; exit status 1 if a case is wrong."""

    out: Path
    """Folder of one JSON file a part; a part whose file is there is not run again."""
    device: str = "cuda"
    """Also cuda:1 and so on; cpu runs tiny sizes through the same steps, with TRITON_INTERPRET=1."""
    minutes: Span = 10.0
    """What takes longer is left out, and said to be."""
    again: bool = False
    """Run every part, whatever is in the folder."""

    def run(self) -> None:
        from .commands import run_gpu_suite

        run_gpu_suite(self)


@dataclass
class Prefill:
    """Time to first token, prompt tokens a second and memory of whole models, against the length of the prompt.

    VL-Mamba and ML-Mamba beside Transformers of the same size with the same encoders, and beside TinyLLaVA and
    MobileVLM v2, by their shapes, with random weights. The time is from the images to the choice of a token; the
    encoder's share is shown apart. Before that each model's steps must give the logits of its own prompts: exit status
    1 if one's do not. What does not fit, or would take longer than the budget, is a row that says so.
    """

    models: tuple[Model, ...] = MODELS
    batch: tuple[Count, ...] = (1,)
    context: tuple[Count, ...] = (1024, 4096, 16384, 65536, 131072)
    """Tokens of the prompt, an image's among them."""
    size: Size | None = None
    """By default published on a GPU, and small on a CPU."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """By default bf16 for the published size, fp32 for the small one."""
    device: str = "cpu"
    budget: Span = 60.0
    """Seconds a cell; one that is predicted to take longer is left out, and a long one measured once."""
    out: Path | None = None
    """JSON file to write, after every cell; beside it a table as .csv, a plot as .png, and all of it in one .html. What
    is in it already is not measured again."""

    def run(self) -> None:
        from .inference import measure

        measure(self)


@dataclass
class Decode:
    """Tokens a second and memory of whole models that write on, against the context at which they begin, and batch.

    Models and checks are those of `prefill`.
    """

    models: tuple[Model, ...] = MODELS
    batch: tuple[Count, ...] = ()
    """Sequences at once; by default 1, 8 and 64, or 1 and 8 for the small size."""
    context: tuple[Count, ...] = (1024, 4096, 16384, 65536, 131072)
    size: Size | None = None
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    device: str = "cpu"
    steps: Count = 24
    """Timed steps a cell, in three rounds."""
    budget: Span = 60.0
    out: Path | None = None

    def run(self) -> None:
        from .inference import measure

        measure(self)


COMMANDS = {
    "run": Run,
    "sweep": Sweep,
    "bridge": Bridge,
    "compile-report": CompileReport,
    "roofline": Roofline,
    "gpu-suite": GPUSuite,
    "compare": Compare,
    "verify": Verify,
    "emulate": Emulate,
    "fuzz": Fuzz,
    "prefill": Prefill,
    "decode": Decode,
}
