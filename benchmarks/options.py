"""Options of the `ssm-bench` commands. Nothing here imports torch, so that help and errors in arguments are immediate.

A command is a dataclass: its fields are the options, its docstring is the help.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias, get_args

import tyro

from ..model.fields import Count, Interval, Seed
from .shapes import LETTERS, OPS, SIZES, WIDTHS

Positional = tyro.conf.Positional
Span = Annotated[float, Interval("(0, inf]")]
"""A duration; inf is no limit."""

Op: TypeAlias = Literal[tuple(SIZES)]  # type: ignore[valid-type]
"""The ops of `ssm_kernels`, and complete mixers (blocks)."""
Impl = Literal[
    "ours", "triton", "numba", "torch", "reference", "compiled", "mamba_ssm", "causal_conv1d", "fla", "transformers",
    "mambapy", "mamba_minimal", "mamba2_minimal",
]  # fmt: skip
Metric = Literal["time", "memory", "error"]
Mode = Literal["fwd", "bwd", "fwd+bwd"]
Dtype = Literal["fp32", "fp64", "bf16", "fp16"]
ModelDtype = Literal["fp32", "bf16", "fp16"]
SassTarget = Literal["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
EmulatedTarget = Literal["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"]
Target = Literal[EmulatedTarget, "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"]
"""GPUs that kernels are compiled for; NVIDIA's before Ampere are not among them."""
SizeName: TypeAlias = Literal[(*LETTERS, "chunk_size")]  # type: ignore[valid-type]
PublishedSize: TypeAlias = Literal[tuple(WIDTHS)]  # type: ignore[valid-type]
ShapeName: TypeAlias = Literal[("default", "tiny", *WIDTHS, "vision", "long")]  # type: ignore[valid-type]
ModelType = Literal[
    "mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "bamba", "zamba2", "nemotron_h", "granitemoehybrid",
    "falcon_h1",
]  # fmt: skip
Size = Literal["published", "130m", "small"]
Model = Literal[
    "vl-mamba", "transformer-siglip", "ml-mamba", "ml-mamba-on-mamba1", "transformer-dinov2-siglip", "tinyllava",
    "mobilevlm-v2",
]  # fmt: skip
MODELS: tuple[Model, ...] = get_args(Model)


def _num_cpus() -> int:
    """CPUs that this process may use; macOS does not report them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Command:
    """A command and the function that runs it, whose module is imported only then."""

    function: ClassVar[str]
    """`module:function` in this package; the function takes the command."""

    def run(self) -> None:
        module, function = self.function.split(":")
        getattr(importlib.import_module(f".{module}", __package__), function)(self)


@dataclass(kw_only=True)
class SizeOptions:
    """Sizes of an op's problem; those that are not given are the named shape's."""

    batch: Count | None = None
    """Sequences."""
    length: Count | None = None
    """Steps of each sequence."""
    height: Count | None = None
    """Rows of the grid, whose area is the length."""
    channels: Count | None = None
    """Channels, or the inner width of a block."""
    heads: Count | None = None
    """Heads of SSD."""
    headdim: Count | None = None
    """Channels of a head."""
    d_state: Count | None = None
    """Size of the state of a channel."""
    groups: Count | None = None
    """Groups of B and C, or of a norm."""
    width: Count | None = None
    """Taps of the convolution."""
    rank: Count | None = None
    """Inputs and outputs of a head of Mamba-3; more than one is MIMO."""
    chunk_size: Count | None = None
    """Chunk size of this project's SSD; peers use their own."""


@dataclass
class Measurement(SizeOptions, Command):
    """Options that `run` and `sweep` share."""

    impl: tuple[Impl, ...] = ()
    """ours is the backend that `backend="auto"` takes: triton on a GPU, numba or torch on a CPU. triton on a CPU needs
    TRITON_INTERPRET=1. compiled is torch.compile of the reference. transformers is the code that library runs where no
    kernels are installed. Default: ours, torch, and the peers that are installed and have the op."""
    mode: tuple[Mode, ...] = ()
    """bwd is the backward alone. Default: fwd and fwd+bwd, or in a sweep fwd+bwd; fwd for a decoding step."""
    metric: tuple[Metric, ...] = ("time", "error")
    """memory is the peak of a call, on a CPU of a fresh process, which takes some seconds a row."""
    dtype: Dtype = "fp32"
    """Dtype of the inputs."""
    device: str = "cpu"
    """cpu or cuda, or one of several such as cuda:1."""
    threads: tuple[Count, ...] = ()
    """Numbers of threads on a CPU, a case each; peers run with the first alone. Default: PyTorch's own number."""
    calls: Count = 15
    """Timed calls per implementation and size, at most."""
    budget: Span = 2.0
    """Seconds of the timed calls of a row: fewer calls where they take longer. A row of which a call is predicted to
    exceed it is left out, which its line says."""
    out: Path | None = None
    """JSON file to write, with a table as .csv, a plot as .png, and a page with both as .html beside it."""


@dataclass
class Run(Measurement):
    """Measure implementations of ops side by side: time, share of the machine's limit, error, and peak memory.

    On a CPU the limit is measured first: the largest of bytes, multiply-adds and exponentials over the rates of the
    cores that run. The error of y is relative to the step-by-step reference in float64 or, where that would take long,
    the torch backend in float64; that of gradients to the latter. Exit status 1 if an implementation is wrong.

    Examples:
    $ ssm-bench run selective_scan
    $ ssm-bench run ssd rms_norm --impl ours torch --threads 1 2 --out now.json
    $ ssm-bench run ssd --shape 2.7b --device cuda --dtype bf16 --metric time memory error
    """

    function: ClassVar[str] = "run:run_run"
    op: Positional[tuple[Op, ...]] = field(kw_only=True)
    """Ops of ssm_kernels, and complete mixers (blocks)."""
    shape: tuple[ShapeName, ...] = ("default",)
    """One or more, a case each: a published model's layer at batch 8 and length 2,048; tiny: 8 steps of 64 channels;
    vision: 2.7b on an image's 729 patches; long: 130m over 65,536 steps."""


@dataclass
class Sweep(Measurement):
    """Measure an op against its length (the time of a scan grows in proportion), or another size, and plot it.

    Errors and exit status are those of `run`, at every size.

    Examples:
    $ ssm-bench sweep ssd --out ssd.json
    $ ssm-bench sweep selective_scan --over channels --values 256 512 1024
    """

    function: ClassVar[str] = "run:run_sweep"
    op: Positional[Op] = field(kw_only=True)
    """The op, or a complete mixer (block)."""
    impl: tuple[Impl, ...] = ("ours",)
    shape: ShapeName = "default"
    """The sizes that are not swept, as in `run`, but with batch 1 by default."""
    batch: Count | None = field(default=1, kw_only=True)
    """Sequences."""
    over: SizeName = "length"
    """The size that is swept."""
    values: tuple[Count, ...] = ()
    """Its values. Default for the length: 1,024 to 65,536 by doubling."""
    calls: Count = 5
    budget: Span = 30.0
    out: Path = Path("sweep.json")


@dataclass
class Integration(Command):
    """Time transformers' models with and without enable(): the gain for a training step.

    Both sides have the same weights and take turns; differences of logits and gradients from transformers' own are
    beside the times. Exit status 1 if they do not agree.

    Examples:
    $ ssm-bench integration mamba2
    $ ssm-bench integration mamba bamba --layers 4 --out integration.json
    """

    function: ClassVar[str] = "integration:run_integration"
    model_type: Positional[tuple[ModelType, ...]] = ("mamba", "mamba2")
    """Model types of transformers."""
    mode: tuple[Mode, ...] = ("fwd", "fwd+bwd")
    """bwd is the backward alone."""
    length: Count = 1024
    """Tokens of a sequence."""
    batch: Count = 1
    """Sequences."""
    width: Count = 768
    """Width of the residual stream; the inner width of the state-space layers is twice that."""
    layers: Count = 1
    """Layers of the model."""
    dtype: Dtype = "fp32"
    """Dtype of the weights."""
    device: str = "cpu"
    """cpu or cuda, or one of several such as cuda:1."""
    calls: Count = 5
    """Timed calls per side, at most."""
    budget: Span = 30.0
    """Seconds of the timed calls of a side; one whose first call takes longer, as of transformers' own Mamba, is called
    once."""
    out: Path | None = None
    """JSON file to write, with a table as .csv, a plot as .png, and a page with both as .html beside it."""


@dataclass
class Roofline(Command):
    """Print bytes, operations and exponentials of each op at the published sizes, the least time, and its bound.

    Examples:
    $ ssm-bench roofline ssd --device H100 MI300X
    """

    function: ClassVar[str] = "roofline:run_roofline"
    op: Positional[tuple[str, ...]] = OPS
    """Ops; all by default."""
    size: tuple[PublishedSize, ...] = ("2.7b",)
    """Models of Mamba and Mamba-2; the connectors' ops are those of 2.7b."""
    dtype: ModelDtype = "bf16"
    """Dtype of the inputs."""
    device: tuple[Literal["A100", "H100", "H200", "B200", "B300", "MI300X", "L40S", "RTX 4090"], ...] = ("H100",)
    """GPUs, by their published rates."""
    out: Path | None = None
    """JSON file to write."""


@dataclass
class CompileReport(Command):
    """Compile the kernels of the ops with no GPU; exit status 1 if one spills or needs too much shared memory.

    Examples:
    $ ssm-bench compile-report --quick
    $ ssm-bench compile-report ssd --target sm_90 gfx942
    """

    function: ClassVar[str] = "compile_report:run_compile_report"
    op: Positional[tuple[str, ...]] = OPS
    """Ops; all by default."""
    target: tuple[Target, ...] = ()
    """Default: every shipped configuration for sm_80, sm_90, sm_100 and gfx942, and the 2.7b models for the others."""
    quick: bool = False
    """The 2.7b models in bf16 alone, and, where no target is given, sm_90."""
    jobs: Count = _num_cpus()
    """Processes."""
    out: Path | None = None
    """JSON file to write; the table goes beside it as .txt."""


@dataclass
class MachineCode(Command):
    """Count the machine code of a call with no GPU: instructions by pipe, bytes by tensor, and the bounds they set.

    Launches are recorded and compiled, and each basic block counts as often as it runs with the launch's arguments.
    Instructions are a token and head of SSD, 32 channels of a token (an element) of the other ops. The bounds are of
    throughput: latencies come on top. The Triton kernels of peers that are installed are counted beside, at the
    configuration with the lowest bound. Kernels that Triton's cache has are not compiled again.

    Examples:
    $ ssm-bench machine-code ssd --json before.json
    $ ssm-bench machine-code ssd --compare before.json
    $ ssm-bench machine-code selective_scan --shape 130m --batch 1 --target sm_80 --mode fwd
    """

    function: ClassVar[str] = "machine_code.command:run_machine_code"
    op: Positional[tuple[str, ...]] = ("ssd", "selective_scan")
    """Ops."""
    shape: tuple[Literal["130m", "370m", "790m", "1.3b", "2.7b"], ...] = ("2.7b",)
    """Layers of Mamba and Mamba-2, at batch 8 and length 2,048."""
    batch: Count | None = None
    """Sequences; 8 by default."""
    length: Count | None = None
    """Steps of each sequence; 2,048 by default."""
    dtype: Dtype = "bf16"
    """Dtype of the inputs."""
    target: tuple[SassTarget, ...] = ("sm_90",)
    """gfx942 is refused: its text has no loops that this command can follow."""
    mode: tuple[Literal["fwd", "train-fwd", "bwd", "step"], ...] = ()
    """Passes; train-fwd is the forward that saves what the backward needs. Default: all that differ."""
    device: tuple[Literal["H100", "H200", "A100", "B200", "B300", "RTX 4090", "RTX 5090"], ...] = ()
    """Devices of the bounds. Default: the first with the target's machine code."""
    peer: tuple[Literal["mamba_ssm", "fla"], ...] = ("mamba_ssm", "fla")
    """Projects whose Triton kernels are counted beside, where they are installed."""
    jobs: Count = _num_cpus()
    """Processes that compile."""
    json: Path | None = None
    """JSON file to write."""
    compare: Path | None = None
    """An earlier JSON file; exit status 1 if a figure of a pass became worse."""
    tolerance: Annotated[float, Interval("[0, inf)")] = 0.01
    """Relative growth up to which a figure did not become worse."""


@dataclass
class Compare(Command):
    """Compare a later file of `run` or `sweep` with an earlier one; exit status 1 for a significant regression.

    The test is Mann and Whitney's, on the times of single calls, with Holm's correction for the number of rows.

    Examples:
    $ ssm-bench compare before.json after.json
    """

    function: ClassVar[str] = "compare:run_compare"
    before: Positional[Path]
    """The earlier JSON file."""
    after: Positional[Path]
    """The later one."""
    threshold: Annotated[float, Interval("[0, inf)")] = 0.05
    """Relative slowdown of the median up to which there is no regression."""
    alpha: Annotated[float, Interval("(0, 1)")] = 0.01
    """Significance level."""
    relative_to: str | None = None
    """An implementation in both files that did not change: times become multiples of its own, so that a drift of the
    machine cancels."""


@dataclass
class Against(Command):
    """Time the ops of this checkout and of another one, such as an earlier commit, in processes that take turns.

    On a CPU with one thread, in fp32; a step or a tiny call is repeated within a sample.

    Examples:
    $ git worktree add ../before d90f8f8
    $ ssm-bench against ../before --backend torch
    """

    function: ClassVar[str] = "against:run_against"
    checkout: Positional[Path]
    """Folder of the other checkout."""
    backend: Literal["auto", "numba", "torch", "reference"] = "auto"
    """The other checkout's; this one's is auto."""
    op: tuple[Literal[OPS], ...] = (  # type: ignore[valid-type]
        "selective_scan",
        "ssd",
        "causal_conv1d",
        "rms_norm",
        "add_rms_norm",
        "selective_scan_step",
        "ssd_step",
        "causal_conv1d_step",
    )
    """Ops."""
    shape: tuple[ShapeName, ...] = ("default", "tiny")
    """Sizes, as in `run`."""
    rounds: Count = 5
    """Processes of each checkout."""
    out: Path | None = None
    """JSON file to write, with a table as .csv, a plot as .png, and a page with both as .html beside it."""


@dataclass
class Page(Command):
    """Write the tables of a documentation page from the files that its commands write.

    A table is between `<!-- table: FILE -->` and `<!-- end of table -->`. Paths are relative to the current folder.

    Examples:
    $ ssm-bench page docs/benchmarks.md
    $ ssm-bench page docs/benchmarks.md --measure
    """

    function: ClassVar[str] = "page:run_page"
    page: Positional[Path]
    """The page, in Markdown."""
    measure: bool = False
    """Run the page's `ssm-bench run` and `sweep` commands first, one after another."""


@dataclass
class Verify(Command):
    """Compare your own function with the reference at every option of an op; exit status 1 if it is wrong.

    It has the op's signature without `backend`, and takes arguments by name. An argument that it does not name is
    reported as not tested, as is a case at which it raises NotImplementedError. It returns what the op returns, or y
    alone. Gradients are compared where its results carry them.

    Examples:
    $ ssm-bench verify --kernel mine.py:scan selective_scan
    $ ssm-bench verify --kernel mine.py:scan selective_scan --ptx sm_90
    """

    function: ClassVar[str] = "verify:run_verify"
    op: Positional[str]
    """The op that it computes."""
    kernel: str
    """path.py:function."""
    dtype: tuple[Dtype, ...] = ("fp32", "bf16")
    """Dtypes of the inputs."""
    device: str = "cpu"
    """cpu or cuda, or one of several such as cuda:1."""
    ptx: EmulatedTarget | None = None
    """Compile its Triton kernels for this GPU and emulate them on CPU tensors, with no GPU."""


@dataclass
class Emulate(Command):
    """Run the kernels of the ops, compiled for a GPU, in an emulator on this CPU; exit status 1 if one is wrong.

    Every access is checked: races between warps and between programs, missing waits and fences, accesses outside the
    tensors. Compiling takes 1 to 70 s a kernel the first time; Triton caches the result.

    Examples:
    $ ssm-bench emulate causal_conv1d
    $ ssm-bench emulate ssd --target sm_90 sm_100 --tiles published
    """

    function: ClassVar[str] = "emulate:run_emulate"
    op: Positional[tuple[str, ...]] = OPS
    """Ops; all by default."""
    target: tuple[EmulatedTarget, ...] = ("sm_90",)
    """GPUs that the kernels are compiled for: sm_80 A100, sm_90 H100, sm_100 B200, sm_120 RTX 50."""
    dtype: tuple[Dtype, ...] = ("bf16",)
    """Dtypes of the inputs."""
    tiles: Literal["small", "published"] = "small"
    """published: head and state sizes of the published models."""
    plain: bool = False
    """The plain call of each op alone, without its options."""
    out: Path | None = None
    """JSON file to write."""


@dataclass
class Fuzz(Command):
    """Compare random calls of every backend, with extreme values, with the reference; exit status 1 on a mismatch.

    Backends: torch, numba on a CPU, and triton on a GPU or, with TRITON_INTERPRET=1, in its interpreter.

    Examples:
    $ ssm-bench fuzz --minutes 10
    $ ssm-bench fuzz --seed 17 --trials 1
    """

    function: ClassVar[str] = "fuzz:run_fuzz"
    minutes: Span = 1.0
    """Time after which no further trial starts."""
    seed: Seed | None = None
    """Seed of the first trial; the next ones count up from it. Default: another one each time."""
    trials: Count | None = None
    """Most trials to run; 1 repeats the trial of a seed."""
    op: tuple[str, ...] = OPS
    """Ops; all by default."""
    device: str = "cpu"
    """cpu or cuda, or one of several such as cuda:1."""
    out: Path | None = None
    """JSON file to write."""


@dataclass
class GPUSuite(Command):
    """Test and time every op on a GPU, beside its peers, and compare tiles. Exit status 1 if a case is wrong.

    Examples:
    $ ssm-bench gpu-suite --out suite.json
    """

    function: ClassVar[str] = "gpu_suite:run_gpu_suite"
    out: Path
    """JSON file, written after every case; cases that it has are not run again."""
    device: str = "cuda"
    """Also cuda:1 and so on; cpu runs tiny sizes through the same steps, with TRITON_INTERPRET=1."""
    minutes: Span = 10.0
    """Cases beyond this time are left out and counted; the same command goes on with them."""
    again: bool = False
    """Run every case, also those that the file has."""


@dataclass
class StateFormats(Command):
    """Error of decoding steps with the state in each format, rounded to the nearest and stochastically.

    One layer of Mamba and one of Mamba-2, with the decay rates and step sizes of their initialization.

    Examples:
    $ ssm-bench state-formats --steps 1000
    """

    function: ClassVar[str] = "state_formats:run_state_formats"
    steps: Count = 10_000
    """Tokens, one after the other."""
    seed: Seed = 0
    """Seed of weights and tokens."""
    out: Path | None = None
    """JSON file to write."""


@dataclass
class Prefill(Command):
    """Time to first token, prompt tokens a second and memory of vision-language models, against prompt length.

    VL-Mamba and ML-Mamba beside Transformers of the same size with the same encoders, and beside TinyLLaVA and
    MobileVLM v2, by their shapes, with random weights. The time is from the images to the choice of a token; the
    encoder's share is a column. Before that each model's decoding steps must return the logits of its own prompts:
    exit status 1 if they do not. A row that does not fit in memory, or would exceed the budget, says so.

    Examples:
    $ ssm-bench prefill --context 512 2048 --out prefill.json
    """

    function: ClassVar[str] = "inference.command:run_inference"
    models: tuple[Model, ...] = MODELS
    """Models; all by default."""
    batch: tuple[Count, ...] = (1,)
    """Sequences at once."""
    context: tuple[Count, ...] = (1024, 4096, 16384, 65536, 131072)
    """Tokens of a prompt, with those of its image; in `decode`, of a sequence before the first timed step."""
    size: Size | None = None
    """Default: published on a GPU, small on a CPU."""
    dtype: ModelDtype | None = None
    """Default: bf16 for the published size, fp32 for the small one."""
    device: str = "cpu"
    """cpu or cuda, or one of several such as cuda:1."""
    budget: Span = 60.0
    """Seconds per row; one that is predicted to take longer is left out, and a long one measured once."""
    out: Path | None = None
    """JSON file to write after every row, with a table as .csv, a plot as .png, and a page with both as .html beside
    it. Rows that the file already has are not measured again."""


@dataclass
class Decode(Prefill):
    """Tokens a second and memory of vision-language models that generate, against context and batch.

    Models and checks are those of `prefill`.

    Examples:
    $ ssm-bench decode --batch 1 8 --out decode.json
    $ ssm-bench decode --device cuda --out claim.json
    """

    batch: tuple[Count, ...] = ()
    """Sequences at once. Default: 1, 8 and 64, or 1 and 8 for the small size."""
    quantize: tuple[Literal["int8", "int4"], ...] = ()
    """Measure this project's models with quantized weights too."""
    steps: Count = 24
    """Timed steps per row, in three rounds."""


@dataclass
class Draft(Command):
    """Speculative decoding: accepted tokens, tokens a step, and time with a draft model and without.

    The model answers the same questions alone and with the draft, by turns; the time is that of whole answers, the
    least of three rounds. For language models the data has texts without images.

    Examples:
    $ ssm-bench draft runs/demo-quick/vl-mamba/model small/model --question "describe the image"
    """

    function: ClassVar[str] = "draft:run_draft"
    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    draft: Positional[str]
    """Smaller model of the same kind and with the same tokenizer."""
    data: Path | None = None
    """Conversations in LLaVA's format, whose first questions are asked; easy-VQA's test questions by default."""
    images: Path | None = None
    """Folder or archive that image paths in the data are relative to; the file's own folder by default."""
    question: str | None = None
    """Asked about every record's images, in place of its own question."""
    limit: Count = 50
    """Questions, each about other images."""
    batch: tuple[Count, ...] = (1,)
    """Questions that are answered together."""
    draft_tokens: tuple[Count, ...] = (1, 2, 4)
    """Tokens that the draft proposes for each step of the model."""
    max_new_tokens: Count = 32
    """Longest answer, in tokens."""
    dtype: ModelDtype | None = None
    """Dtype of the weights; the checkpoint's own by default."""
    device: str = "cpu"
    """cpu or cuda, or one of several such as cuda:1."""
    out: Path | None = None
    """JSON file for the figures."""


COMMANDS: dict[str, type[Command]] = {
    "run": Run,
    "sweep": Sweep,
    "integration": Integration,
    "compile-report": CompileReport,
    "roofline": Roofline,
    "machine-code": MachineCode,
    "gpu-suite": GPUSuite,
    "compare": Compare,
    "against": Against,
    "page": Page,
    "verify": Verify,
    "emulate": Emulate,
    "fuzz": Fuzz,
    "state-formats": StateFormats,
    "prefill": Prefill,
    "decode": Decode,
    "draft": Draft,
}
