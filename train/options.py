"""Options of the `vlmamba` commands. Nothing here imports torch, so that help and mistakes are answered at once.

A command is a dataclass: its fields are the options, its docstring is the help, and `run` imports what does the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..model.fields import Count, Interval, Size
from ..model.generation_config import GenerationConfig
from ..model.prompt import TEMPLATES
from .config import Changeable, LoraConfig, Target

Positional = tyro.conf.Positional
PresetName = Literal["quick", "full"]
DtypeName = Literal["fp32", "bf16", "fp16"]
Sampling = Annotated[GenerationConfig, tyro.conf.arg(name="")]
OfRecipe = tyro.conf.arg(help_behavior_hint="(default: the recipe's)")


@dataclass
class Demo:
    """Train a tiny VL-Mamba and ML-Mamba on easy-VQA, evaluate, plot. Interrupted, it resumes."""

    preset: PresetName = "quick"
    """quick: about ten minutes on two cores; full: about an hour."""
    output: Path | None = None
    """Folder of the run; runs/demo-PRESET by default."""
    device: str = "cpu"

    def run(self) -> None:
        from ..model.device import device_named
        from .demo import run_demo
        from .lock import only_run_in
        from .recipes import DEMOS

        folder = self.output or Path("runs") / f"demo-{self.preset}"
        device = str(device_named(self.device))
        with only_run_in(folder):
            run_demo(DEMOS[self.preset], folder, device)


@dataclass
class Data:
    """Write a data set in LLaVA's format, to train and evaluate on."""

    name: Positional[Literal["easy-vqa"]]
    """easy-vqa: 5,000 images of one shape and 48,248 questions, from the package of that name."""
    folder: Positional[Path]
    """Folder for the annotations and images."""

    def run(self) -> None:
        from .easy_vqa import export

        export(self.folder)
        print(f"wrote {self.folder}")


@dataclass(frozen=True)
class LoraSettings:
    """Changes of low rank instead of the whole language model."""

    rank: int | None = None
    """Of the changes; without it the language model learns whole."""
    alpha: float | None = None
    """The changes are multiplied by alpha / rank; 2 rank by default."""
    dropout: float | None = None
    """Of the input of the changes; 0 by default."""
    targets: tuple[Target, ...] | None = None
    """Projections that are changed; in_proj and out_proj by default. Mamba-1 has x_proj and dt_proj too."""

    def config(self) -> LoraConfig | None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            return None
        if self.rank is None:
            raise ValueError(f"--lora.{next(iter(given))} needs --lora.rank")
        return LoraConfig(**{"alpha": 2.0 * self.rank, **given})


@dataclass(frozen=True)
class Settings:
    """Fields of `StageConfig` that the command may change; None keeps the recipe's."""

    trainable: Annotated[tuple[str, ...] | None, OfRecipe] = None
    """Beginnings of the names of the parameters that learn; the others are frozen. An empty text is all of them."""
    lr: Annotated[float | None, OfRecipe] = None
    epochs: Annotated[float | None, OfRecipe] = None
    batch_size: Annotated[int | None, OfRecipe] = None
    """Samples a step."""
    micro_batch_size: Annotated[int | None, OfRecipe] = None
    """Samples that a rank runs at once; the gradients of a step's micro batches are added up. None is all it has."""
    weight_decay: Annotated[float | None, OfRecipe] = None
    betas: Annotated[tuple[float, float] | None, OfRecipe] = None
    warmup_ratio: Annotated[float | None, OfRecipe] = None
    """Part of the steps over which the learning rate rises; it then falls to zero along a cosine."""
    grad_clip: Annotated[float | None, OfRecipe] = None
    """Largest norm of the gradient."""
    max_loss: Annotated[float | None, OfRecipe] = None
    """A larger loss stops the stage, as one that is not a number does. To guess among 50,000 tokens costs 11."""
    precision: Annotated[Literal["fp32", "bf16"] | None, OfRecipe] = None
    """`bf16` runs matrix products in bfloat16 (autocast); weights and scans stay float32."""
    gradient_checkpointing: Annotated[bool | None, OfRecipe] = None
    """Keep only the inputs of each block for the backward, which computes the rest again."""
    context_parallel: Annotated[int | None, OfRecipe] = None
    """Ranks that split each batch along its tokens, where these are too many for one; it divides their number."""
    seed: Annotated[int | None, OfRecipe] = None
    save_every: Annotated[int | None, OfRecipe] = None
    """Steps between checkpoints."""
    keep_last: Annotated[int | None, OfRecipe] = None
    """Checkpoints kept."""
    workers: Annotated[int | None, OfRecipe] = None
    """Processes that prepare data ahead of the loop; 0 prepares it in the loop. The result is the same."""
    max_broken: Annotated[float | None, OfRecipe] = None
    """Share of the samples that may be broken, and are then replaced and reported. At 0 the first is an error."""


@dataclass
class Train:
    """Train a model by a recipe, on conversations in LLaVA's format. Given again, the same command resumes.

    On several devices the command is the same behind torchrun, and so is the batch of a step:
    torchrun --nproc-per-node 8 -m vlmamba.train.cli train ...
    """

    model: Positional[str]
    """Folder of a saved model, a name on the Hugging Face Hub, a preset such as vl-mamba-2.8b, or a recipe (vl-mamba,
    ml-mamba): the model of its paper."""
    output: Path
    """Folder for metrics and checkpoints of each stage; the trained model goes to OUTPUT/model."""
    data: Positional[tuple[Path, ...]] = ()
    """Conversations: JSON lists, .jsonl files with one record a line, or shards as WebDataset writes them (a .tar, a
    folder, or a pattern such as shard-{000..012}.tar). Without any, the recipe's own under --root."""
    images: tuple[Path, ...] = ()
    """Folder or archive that image paths in the data are relative to, one for each file of data or one for all; the
    file's own folder by default."""
    root: Path = Path("data")
    """Where the recipe's own data lie."""
    recipe: str | None = None
    """vl-mamba, ml-mamba or small; by default that of the model's kind, and small for tiny models."""
    stage: Literal["align", "finetune", "both"] = "finetune"
    """align trains the connector alone; finetune the connector and the language model; both one after the other."""
    dry_run: bool = False
    """Check everything, tell what the run will take, and train nothing."""
    sample_every: Count | None = None
    """Steps between answers to --samples fixed questions of the data, for OUTPUT/STAGE/answers.jsonl."""
    samples: Count = 4
    """How many questions --sample-every asks."""
    peak_tflops: Annotated[float, Interval("(0, inf)")] | None = None
    """Of one device, at the precision trained in (`ssm-bench roofline` knows some); tells the share of it in use."""
    wandb: str | None = None
    """Project at Weights & Biases to send figures to."""
    device: str = "auto"
    """auto is a GPU where there is one."""
    may_change: tuple[Changeable, ...] = ()
    """Settings that may differ from those of the checkpoint that is resumed. Any other difference is refused."""
    lora: LoraSettings = LoraSettings()
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings()

    def run(self) -> None:
        from .training import run_training

        run_training(self)


@dataclass
class Ablate:
    """Compare connectors and scans on easy-VQA, each with the same seeds; print and plot the table."""

    family: Literal["vl-mamba", "ml-mamba"] = "vl-mamba"
    seeds: Annotated[int, Interval("[1, 1000]")] = 3
    """How many seeds."""
    preset: PresetName = "quick"
    shorten: Annotated[float, Interval("(0, inf)")] = 1.0
    """Train so many times fewer epochs than the preset."""
    questions: Count = 2000
    """Test questions asked."""
    output: Path | None = None
    """Folder of the run; runs/ablate-FAMILY by default. Given again, it resumes."""
    device: str = "cpu"

    def run(self) -> None:
        from ..model.device import device_named
        from .ablate import run_ablation
        from .lock import only_run_in
        from .recipes import DEMOS

        recipe = DEMOS[self.preset].faster(self.shorten)
        folder = self.output or Path("runs") / f"ablate-{self.family}"
        device = str(device_named(self.device))
        with only_run_in(folder):
            run_ablation(self.family, recipe, folder, range(self.seeds), self.questions, device)


@dataclass
class Evaluate:
    """Ask a saved model the first question of every record of a LLaVA file, or of easy-VQA's test set."""

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    data: Path | None = None
    """Conversations in LLaVA's format; easy-VQA's test questions by default."""
    images: Path | None = None
    batch_size: Size = 256
    max_new_tokens: Annotated[int, Interval("[0, inf)")] = 32
    device: str = "auto"
    """auto is a GPU where there is one."""

    def run(self) -> None:
        from ..model.device import device_named
        from ..model.vlm import VLM
        from . import easy_vqa
        from .data import read_llava
        from .evaluate import answer_all

        records = easy_vqa.load("test") if self.data is None else read_llava(self.data, self.images)
        if not len(records):
            raise ValueError(f"no records in {self.data}")
        model = VLM.from_pretrained(self.model, device_map=device_named(self.device))
        answers = answer_all(model, records, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        if self.data is None:
            for name, share in easy_vqa.scores(records, answers).items():
                print(f"{name:<8} {share:.2%}")
        else:
            right = sum(a.strip() == r.turns[1].text.strip() for a, r in zip(answers, records, strict=True))
            print(f"exact match {right / max(1, len(records)):.2%} of {len(records)}")


@dataclass
class Generate:
    """Answer a question about an image, or none; or those of a file, in batches. Language models go on from a text."""

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    prompt: Positional[str | None] = None
    """The question, or the text to go on from."""
    image: Path | None = None
    """What it is about. With --prompts: of each prompt that has none of its own."""
    prompts: Path | None = None
    """File of prompts, one a line; or JSONL, records with "prompt" and perhaps "image", a path relative to the file.
    Answers are printed as JSONL; a prompt that cannot be answered has an "error" in place of the "answer"."""
    output: Path | None = None
    """JSONL file that the answers to --prompts are appended to. Given again, the same command goes on with it."""
    batch_size: Size = 8
    """Prompts of a file that are answered together."""
    sampling: Sampling = GenerationConfig()
    dtype: DtypeName | None = None
    """The file's own by default."""
    device: str = "auto"
    """auto is a GPU where there is one."""

    def run(self) -> None:
        from .inference import run_generate

        run_generate(self)


@dataclass
class Chat:
    """Talk to a model. /image PATH shows it an image, /reset begins anew, /help lists the commands, /quit ends."""

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    image: Path | None = None
    """Image to talk about from the beginning."""
    history: bool = True
    """Each question is about the conversation so far, where the model's template has turns; else it stands alone."""
    template: Literal[tuple(TEMPLATES)] | None = None  # type: ignore[valid-type]
    """Of the turns; the model's own by default. A language model without one goes on from each text by itself."""
    verbose: bool = False
    """Say after each answer how long it took, and how large the state is."""
    sampling: Sampling = GenerationConfig()
    dtype: DtypeName | None = None
    """The file's own by default."""
    device: str = "auto"
    """auto is a GPU where there is one."""

    def run(self) -> None:
        from .inference import run_chat

        run_chat(self)


@dataclass
class Inspect:
    """Show what a checkpoint is: parameters, memory for weights and state, operations a token. Weights are not read."""

    model: Positional[str]
    """Folder, preset such as vl-mamba-2.8b (nothing is downloaded), or name on the Hugging Face Hub."""
    dtype: DtypeName | None = None
    """As if it were loaded so; the file's own by default."""
    json: bool = False
    """Print JSON; sizes are bytes, and operations are floating-point operations."""

    def run(self) -> None:
        from .inference import run_inspect

        run_inspect(self)


@dataclass
class Convert:
    """Write a model in another layout: this library's; of language models, that of state-spaces (mamba_ssm) or
    transformers; of vision-language models, that of Cobra's and ML-Mamba's releases."""

    src: Positional[str]
    """Folder, or name on the Hugging Face Hub, in any layout that is known."""
    dst: Positional[Path]
    """Folder to write, new or empty."""
    to: Literal["own", "state-spaces", "transformers", "released"]
    dtype: DtypeName | None = None
    """The file's own by default."""

    def run(self) -> None:
        from .inference import run_convert

        run_convert(self)


COMMANDS = {
    "demo": Demo,
    "data": Data,
    "train": Train,
    "ablate": Ablate,
    "evaluate": Evaluate,
    "generate": Generate,
    "chat": Chat,
    "inspect": Inspect,
    "convert": Convert,
}
