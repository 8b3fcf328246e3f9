"""`vlmamba train`."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from ..help import Default
from ..model.fields import Count, Interval
from ..train.config import Changeable, Checkpoints, Execution, Loading, LoraConfig, Optimization, StageConfig, Target
from .options import Group, Positional, Quantization

SHOWN = ("vl-mamba", "ml-mamba", "small")
RECIPE_DEFAULTS = {
    "trainable": ("connector language_model",) * 3,
    "lr": ("2e-05", "2e-05", "0.001"),
    "epochs": ("1", "2", "1"),
    "batch_size": ("128", "64", "64"),
    "micro_batch_size": ("8", "8", "all"),
    "weight_decay": ("0", "0.1", "0"),
    "precision": ("bf16", "bf16", "fp32"),
    "gradient_checkpointing": ("on", "on", "off"),
    "seed": ("0", "7", "0"),
}
"""Settings of the finetune stage in the recipes `SHOWN`. The help imports no recipe; a test holds them to these."""


LORA = LoraConfig()


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (LoRA) in place of full finetuning of the language model."""

    rank: int | None = None
    """Rank of the adapters; without it the language model is trained in full."""
    alpha: Annotated[float | None, Default("2 * rank")] = None
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float | None, Default(f"{LORA.dropout}")] = None
    """Dropout of the adapters' input."""
    targets: Annotated[tuple[Target, ...] | None, Default(" ".join(LORA.targets))] = None
    """Projections with an adapter. Mamba-1 has x_proj and dt_proj too."""

    def config(self) -> LoraConfig | None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            return None
        if self.rank is None:
            raise ValueError(f"--lora.{next(iter(given))} needs --lora.rank")
        return LoraConfig(**{"alpha": 2.0 * self.rank, **given})


def recipe_default(config: type, name: str) -> Default:
    """Default of a setting that the recipe has: the value in each recipe, or the one in all."""
    shared = getattr(config, name, None)
    text = " ".join(map(str, shared)) if isinstance(shared, tuple) else f"{shared}"
    values = RECIPE_DEFAULTS.get(name, (text,))
    each = ", ".join(f"{recipe} {value}" for recipe, value in zip(SHOWN, values, strict=False))
    return Default(each if len(set(values)) > 1 else values[0])


def overrides_of(config: type) -> type:
    """Derive the options that override the fields of a part of a stage's config, with its types and its help.

    Args:
        config: a dataclass.

    Returns:
        A dataclass with the fields of the config, each None by default: the recipe's value is kept.
    """
    hints = get_type_hints(config, include_extras=True)
    options = [(name, Annotated[hint | None, recipe_default(config, name)], None) for name, hint in hints.items()]
    # A subclass, in which the docstrings of the fields are found.
    return make_dataclass(config.__name__, options, bases=(config,), frozen=True, namespace={"__doc__": config.__doc__})


OptimizationOptions = overrides_of(Optimization)
ExecutionOptions = overrides_of(Execution)
LoadingOptions = overrides_of(Loading)
CheckpointOptions = overrides_of(Checkpoints)


@dataclass(frozen=True)
class DataOptions(LoadingOptions):
    """Images and files of the data, and preparation of the samples."""

    images: tuple[Path, ...] = ()
    """Folder or archive that image paths in the data are relative to, one for each data file or one for all; the file's
    own folder by default."""
    root: Path = Path("data")
    """Folder of the recipe's own data files."""


@dataclass(frozen=True)
class LoggingOptions:
    """Metrics, which are always in OUTPUT/STAGE as JSON Lines, and sample answers."""

    sample_every: Count | None = None
    """Steps between answers to --samples fixed questions of the data, shown and written to
    OUTPUT/STAGE/answers.jsonl."""
    samples: Count = 4
    """Number of questions for --sample-every."""
    peak_tflops: Annotated[float, Interval("(0, inf)")] | None = None
    """Peak TFLOPS of one device at the training precision (`ssm-bench roofline` lists some); reports utilization."""
    wandb: str | None = None
    """Weights & Biases project to log to."""


@dataclass
class Train:
    """Train a model by a recipe, on conversations in LLaVA's format. The same command resumes an interrupted run.

    On several devices the command is the same behind torchrun, and so is the batch of a step.

    Examples:
    $ vlmamba data easy-vqa data
    $ vlmamba train runs/demo-quick/vl-mamba/model data/train.json --output runs/mine --sample-every 50
    $ vlmamba train vl-mamba --stage both --root data --output runs/vl-mamba --dry-run
    $ torchrun --nproc-per-node 8 -m vlmamba train vl-mamba --stage both --root data --output runs/vl-mamba
    """

    model: Positional[str]
    """Folder of a saved model, a name on the Hugging Face Hub, a preset such as vl-mamba-2.8b, or a recipe (vl-mamba,
    ml-mamba): the model of its paper."""
    output: Path
    """Folder for metrics and checkpoints of each stage; the trained model goes to OUTPUT/model."""
    data: Positional[tuple[Path, ...]] = ()
    """Conversations: JSON lists, .jsonl files with one record a line, or WebDataset shards (a .tar, a folder, or a
    pattern such as shard-{000..012}.tar). By default the recipe's own files under --root."""
    recipe: str | None = None
    """vl-mamba, ml-mamba or small; by default that of the model's kind, and small for tiny models."""
    stage: Literal["align", "finetune", "both"] = "finetune"
    """align trains the connector alone; finetune the connector and the language model; both one after the other."""
    trainable: Annotated[tuple[str, ...] | None, recipe_default(Optimization, "trainable")] = None
    """Prefixes of trainable parameter names in place of the stage's own; everything else is frozen. An empty prefix is
    all of them."""
    dry_run: bool = False
    """Check the data and the model, print steps, tokens and memory, and train nothing."""
    device: str = "auto"
    """auto is a GPU where there is one."""
    may_change: tuple[Changeable, ...] = ()
    """Settings that may differ from those of the checkpoint that is resumed. Any other difference is an error."""
    quantize: Quantization | None = None
    """Hold the frozen matrices in 8 or 4 bits (QLoRA, with --lora.rank). The trained model is in floating point."""
    loading: Group[DataOptions] = DataOptions()
    # Classes that are made at run time.
    optimization: Group[OptimizationOptions] = OptimizationOptions()  # pyright: ignore[reportInvalidTypeForm]
    execution: Group[ExecutionOptions] = ExecutionOptions()  # pyright: ignore[reportInvalidTypeForm]
    checkpoint: Group[CheckpointOptions] = CheckpointOptions()  # pyright: ignore[reportInvalidTypeForm]
    logging: Group[LoggingOptions] = LoggingOptions()
    lora: LoraOptions = LoraOptions()

    def overrides(self) -> dict[str, Any]:
        """Settings of a stage that the command gives."""
        groups = (self.loading, self.optimization, self.execution, self.checkpoint)
        settings = {f.name for f in fields(StageConfig)}
        given = {"trainable": self.trainable} | {k: v for group in groups for k, v in vars(group).items()}
        return {name: value for name, value in given.items() if name in settings and value is not None}

    def run(self) -> None:
        from .train_stages import run_training

        run_training(self)
