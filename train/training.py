"""The commands that train: `train`, and `data`, which gets something to train on."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import math
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ..model.batch import collate
from ..model.config import VLMConfig
from ..model.hub import fetch_model
from ..model.lm import neox_tokenizer
from ..model.load import model_class
from ..model.presets import PRESETS
from ..model.prompt import get_template
from ..model.vlm import VLM
from ..model.weights import Weights, check_fit
from .card import TrainedStage, fingerprint, write_card
from .config import StageConfig
from .data import Conversations, Records, read_llava
from .distributed import processes, rank, world_size
from .loop import train_stage
from .lora import LoraConfig, Target
from .plan import RoughTokenizer, disk_problem, make_plan, measure
from .recipes import RECIPES, DataFile, Recipe, nearest, recipe_for, recipe_named
from .track import SampleAnswers, Tracker

Positional = tyro.conf.Positional
StageName = Literal["align", "finetune"]
File = tuple[Path, Path | None]
"""Annotations, and what their image paths are relative to."""


def _settings_class() -> type:
    """A dataclass with the fields of `StageConfig` that a command may change, each None where the recipe's stays."""
    body = ast.parse(textwrap.dedent(inspect.getsource(StageConfig))).body[0].body
    helps = {
        field.target.id: ast.literal_eval(text.value)
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    hints = typing.get_type_hints(StageConfig)
    fields = []
    for field in dataclasses.fields(StageConfig):
        if field.name not in ("name", "lora"):
            arg = tyro.conf.arg(help=helps.get(field.name, ""), help_behavior_hint="(default: the recipe's)")
            fields.append((field.name, Annotated[hints[field.name] | None, arg], None))
    return dataclasses.make_dataclass("Settings", fields, frozen=True)


Settings: Any = _settings_class()


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
    sample_every: int | None = None
    """Steps between answers to --samples fixed questions of the data, for OUTPUT/STAGE/answers.jsonl."""
    samples: int = 4
    """How many questions --sample-every asks."""
    peak_tflops: float | None = None
    """Of one device, at the precision trained in (`ssm-bench roofline` knows some); tells the share of it in use."""
    wandb: str | None = None
    """Project at Weights & Biases to send figures to."""
    device: str = "auto"
    """auto is a GPU where there is one."""
    lora: LoraSettings = LoraSettings()
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings()

    def run(self) -> None:
        self._check()
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with processes(device) as place:
            self._run(place)

    def _run(self, device: torch.device) -> None:
        model = self.model
        if model in RECIPES and not Path(model).is_dir():
            model = RECIPES[model].model or model
        config = model_config(model)
        name = self.recipe or recipe_for(config)
        recipe = recipe_named(name)
        todo = [(stage, self._files(recipe, stage.name)) for stage in self._stages(recipe)]
        say(f"model {model}, recipe {name}")
        data = [(stage, read_llava(*zip(*files, strict=True), stage.max_broken)) for stage, files in todo]
        if self.dry_run:
            self._plan(model, recipe, data)
        else:
            self._train(model, name, data, device)

    def _check(self) -> None:
        for path in self.data:
            if path.suffix in (".json", ".jsonl") and not path.is_file():
                raise FileNotFoundError(f"no annotations at {path}")
        if self.recipe is not None:
            recipe_named(self.recipe)
        if (self.output / "model").resolve() == Path(self.model).resolve():
            raise ValueError(f"--output {self.output} would replace the model that is begun with: give another folder")
        if self.images and len(self.images) not in (1, len(self.data)):
            raise ValueError(
                f"--images must be one for all data or one for each of {len(self.data)} files, got {len(self.images)}"
            )
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: torch sees no GPU here")
        for option in ("sample_every", "samples", "peak_tflops"):
            if getattr(self, option) is not None and getattr(self, option) <= 0:
                raise ValueError(f"--{option.replace('_', '-')} must be positive, got {getattr(self, option)}")

    def _stages(self, recipe: Recipe) -> list[StageConfig]:
        """The stages asked for, with what the command changes."""
        names: Sequence[StageName] = ("align", "finetune") if self.stage == "both" else (self.stage,)
        given = {name: value for name, value in vars(self.settings).items() if value is not None}
        lora = self.lora.config()
        if lora is not None and "finetune" not in names:
            raise ValueError("--lora is of the finetune stage: in align the language model does not learn")
        stages = [replace(getattr(recipe, name), **given) for name in names]
        return [replace(s, lora=lora) if s.name == "finetune" else s for s in stages]

    def _files(self, recipe: Recipe, stage: str) -> tuple[File, ...]:
        """Annotations, each with its images."""
        if self.data:
            images = self.images or (None,)
            return tuple(zip(self.data, images * (len(self.data) if len(images) == 1 else 1), strict=True))
        own: tuple[DataFile, ...] = getattr(recipe, f"{stage}_data")
        if not own:
            raise ValueError("give DATA, files of conversations: the recipe has none of its own")
        for file in own:
            for path in (self.root / file.annotations, self.root / file.images):
                if not path.exists():
                    raise FileNotFoundError(f"no {path}, which stage {stage} trains on. Get it from {file.source}")
        return tuple((self.root / file.annotations, self.root / file.images) for file in own)

    def _plan(self, name: str, recipe: Recipe, data: Sequence[tuple[StageConfig, Records]]) -> None:
        local = {"local_files_only": True} if is_preset(name) else {}
        model = without_weights(name, **local)
        notes = check_checkpoint(name, model)
        if model.tokenizer is None:
            notes.append("the tokenizer is not here; four characters are counted as a token")
            model.tokenizer = RoughTokenizer()
        plans = []
        for stage, records in data:
            with template_of(recipe, stage, model):
                size = measure(Conversations(records, model))
            plans.append(make_plan(model.config, stage, len(records), size, world_size()))
            say(str(plans[-1]))
        for note in notes:
            say(f"note: {note}")
        problem = disk_problem(self.output, plans)
        if problem is not None:
            raise OSError(problem)
        say("data and checkpoints are in order; nothing was trained")

    def _train(
        self,
        name: str,
        recipe_name: str,
        data: Sequence[tuple[StageConfig, Records]],
        device: torch.device,
    ) -> None:
        load = VLM.from_preset if is_preset(name) else VLM.from_pretrained
        # The other ranks are given their shares by the first.
        model = load(name) if rank() == 0 else without_weights(name)
        done = []
        for stage, records in data:
            with template_of(RECIPES[recipe_name], stage, model):
                self._train_stage(model, stage, records, device)
            if rank() == 0:
                files = tuple(fingerprint(path) for path in records.paths)
                done.append(TrainedStage(stage, len(records), files, self.output / stage.name))
        if rank() == 0:
            model.cpu().eval().save_pretrained(self.output / "model")
            write_card(self.output / "model", name, recipe_name, done, model.config.template)
        say(f"saved {self.output / 'model'}")

    def _train_stage(self, model: VLM, stage: StageConfig, records: Records, device: torch.device) -> None:
        folder, samples = self.output / stage.name, Conversations(records, model)
        make_tracker = functools.partial(Tracker, wandb=self.wandb)
        if self.peak_tflops is not None:
            plan = make_plan(model.config, stage, len(samples), measure(samples, 64), world_size())
            peak = self.peak_tflops * 1e12 * world_size()
            make_tracker = functools.partial(make_tracker, flops_a_token=plan.flops_a_token, peak_flops=peak)
        asked = None
        if self.sample_every is not None:
            chosen = records[:: math.ceil(len(records) / self.samples)]
            asked = SampleAnswers(folder, chosen, self.sample_every, stage.precision)
        train_stage(model, stage, samples, collate, folder, device, asked, make_tracker)


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


def model_config(name: str) -> VLMConfig:
    """The config of a preset, or of a saved model, of which no weights are read.

    Raises:
        ValueError: there is no such name; the nearest is told. Or it is no vision-language model.
        FileNotFoundError, PermissionError, ConnectionError: as `hub.fetch`.
    """
    if is_preset(name):
        return PRESETS[name].config
    if "/" not in name and not Path(name).is_dir():
        raise ValueError(f"no folder, preset or recipe {name!r}{nearest(name, [*PRESETS, *RECIPES])}")
    return _open(name)[0]


def is_preset(name: str) -> bool:
    """Whether a model is a preset. A folder of that name comes first."""
    return name in PRESETS and not Path(name).is_dir()


def without_weights(name: str, **hub: Any) -> VLM:
    """A model on the meta device, with its tokenizer where that can be had."""
    if is_preset(name):
        with torch.device("meta"):
            return VLM(PRESETS[name].config, neox_tokenizer(**hub))
    config, _, folder = _open(name)
    with torch.device("meta"):
        model = VLM(config)
    model.load_extras(folder)
    return model


def check_checkpoint(name: str, model: VLM) -> list[str]:
    """Hold a checkpoint, as far as it is here, against its model. Of the weights only names and shapes are read.

    Returns:
        What could not be checked.

    Raises:
        ValueError: weights and config do not agree, or a file is damaged.
    """
    if not is_preset(name):
        check_fit(model, _open(name)[1], name)
        return []
    preset = PRESETS[name]
    try:
        config, weights = preset.open(local_files_only=True)
    except FileNotFoundError:
        return [f"the weights of {preset.language} and its encoders are not all here; training downloads them"]
    if config != model.config:
        raise ValueError(f"the files of {preset.language} are not those that preset {name} expects")
    for part in (model.language_model, model.vision):
        prefix = "language_model." if part is model.language_model else "vision."
        inner = weights.renamed(lambda n, p=prefix: n.removeprefix(p) if n.startswith(p) else None)
        check_fit(part, inner, f"preset {name}")
    return []


def _open(name: str) -> tuple[VLMConfig, Weights, Path]:
    folder = fetch_model(name)
    if model_class(folder) is not VLM:
        raise ValueError(f"{name} is no vision-language model: give one, or a preset, which joins pretrained parts")
    return *VLM.open_checkpoint(folder), folder


@contextlib.contextmanager
def template_of(recipe: Recipe, stage: StageConfig, model: VLM) -> Iterator[None]:
    """Give a model the prompt template of a stage, and its own again in the end."""
    own = model.template
    if stage.name == "align" and recipe.align_template is not None:
        model.template = get_template(recipe.align_template)
    try:
        yield
    finally:
        model.template = own


def say(text: str) -> None:
    """Print once, whatever the number of ranks."""
    if rank() == 0:
        print(text, flush=True)
