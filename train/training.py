"""The `train` command: checks of what is asked for, a plan of it, and the stages one after the other."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..model.batch import collate
from ..model.config import VLMConfig
from ..model.device import device_named
from ..model.files import remove_partials
from ..model.hub import check_replaceable, fetch_model
from ..model.lm import neox_tokenizer
from ..model.load import model_class
from ..model.presets import PRESETS, is_preset
from ..model.prompt import get_template
from ..model.vlm import VLM
from ..model.weights import Weights, check_fit
from .card import TrainedStage, write_card
from .config import StageConfig
from .data import Conversations, Records, read_llava
from .distributed import on_first_rank, processes, rank, world_size
from .identity import Fingerprint, check_changeable, fingerprint
from .lock import only_run_in
from .loop import train_stage
from .options import Train
from .plan import RoughTokenizer, disk_problem, make_plan, measure
from .recipes import RECIPES, DataFile, Recipe, nearest, recipe_for, recipe_named
from .track import SampleAnswers, Tracker

StageName = Literal["align", "finetune"]
File = tuple[Path, Path | None]
"""Annotations, and what their image paths are relative to."""


def run_training(command: Train) -> None:
    """Do what the command says.

    Raises:
        ValueError, OSError: what is wrong with its options or its data, before anything is trained.
    """
    _check(command)
    device = device_named(command.device)
    with processes(device) as place:
        _run(command, place)


def _run(command: Train, device: torch.device) -> None:
    model = command.model
    if model in RECIPES and not Path(model).is_dir():
        model = RECIPES[model].model or model
    config = model_config(model)
    name = command.recipe or recipe_for(config)
    recipe = recipe_named(name)
    todo = [(stage, _files(command, recipe, stage.name)) for stage in _stages(command, recipe)]
    say(f"model {model}, recipe {name}")
    data = [(stage, read_llava(*zip(*files, strict=True), stage.max_broken)) for stage, files in todo]
    for stage, records in data:
        say(f"stage {stage.name}: {records}")
    for stage, records in data:
        if not len(records):
            raise ValueError(f"stage {stage.name} has nothing to train on: no records in {_listed(records.paths)}")
    if command.dry_run:
        _plan(command, model, recipe, data)
        return
    on_first_rank(lambda: check_replaceable(command.output / "model"))
    with only_run_in(command.output):
        _train(command, model, name, data, device)


def _check(command: Train) -> None:
    for path in command.data:
        if path.suffix in (".json", ".jsonl") and not path.is_file():
            raise FileNotFoundError(f"no annotations at {path}")
    if command.recipe is not None:
        recipe_named(command.recipe)
    check_changeable(command.may_change)
    if (command.output / "model").resolve() == Path(command.model).resolve():
        raise ValueError(f"--output {command.output} would replace the model that is begun with: give another folder")
    if command.images and len(command.images) not in (1, len(command.data)):
        raise ValueError(
            f"--images must be one for all data or one for each of {len(command.data)} files, got {len(command.images)}"
        )


def _stages(command: Train, recipe: Recipe) -> list[StageConfig]:
    """The stages asked for, with what the command changes."""
    names: Sequence[StageName] = ("align", "finetune") if command.stage == "both" else (command.stage,)
    given = {name: value for name, value in vars(command.settings).items() if value is not None}
    lora = command.lora.config()
    if lora is not None and "finetune" not in names:
        raise ValueError("--lora is of the finetune stage: in align the language model does not learn")
    stages = [replace(getattr(recipe, name), **given) for name in names]
    return [replace(s, lora=lora) if s.name == "finetune" else s for s in stages]


def _files(command: Train, recipe: Recipe, stage: str) -> tuple[File, ...]:
    """Annotations, each with its images."""
    if command.data:
        images = command.images or (None,)
        return tuple(zip(command.data, images * (len(command.data) if len(images) == 1 else 1), strict=True))
    own: tuple[DataFile, ...] = getattr(recipe, f"{stage}_data")
    if not own:
        raise ValueError("give DATA, files of conversations: the recipe has none of its own")
    for file in own:
        for path in (command.root / file.annotations, command.root / file.images):
            if not path.exists():
                raise FileNotFoundError(f"no {path}, which stage {stage} trains on. Get it from {file.source}")
    return tuple((command.root / file.annotations, command.root / file.images) for file in own)


def _plan(command: Train, name: str, recipe: Recipe, data: Sequence[tuple[StageConfig, Records]]) -> None:
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
    problem = disk_problem(command.output, plans)
    if problem is not None:
        raise OSError(problem)
    say("data and checkpoints are in order; nothing was trained")


def _train(
    command: Train,
    name: str,
    recipe_name: str,
    data: Sequence[tuple[StageConfig, Records]],
    device: torch.device,
) -> None:
    if rank() == 0:
        for folder in (command.output, command.output / "model"):
            if folder.is_dir():
                remove_partials(folder)
    load = VLM.from_preset if is_preset(name) else VLM.from_pretrained
    # The other ranks are given their shares by the first.
    model = load(name) if rank() == 0 else without_weights(name)
    done = []
    for stage, records in data:
        files = tuple(on_first_rank(lambda records=records: [fingerprint(path) for path in records.paths]))
        with template_of(RECIPES[recipe_name], stage, model):
            _train_stage(command, model, stage, records, files, device)
        done.append(TrainedStage(stage, len(records), files, command.output / stage.name))
    if rank() == 0:
        model.cpu().eval().save_pretrained(command.output / "model")
        write_card(command.output / "model", name, recipe_name, done, model.config.template)
    say(f"saved {command.output / 'model'}")


def _train_stage(
    command: Train,
    model: VLM,
    stage: StageConfig,
    records: Records,
    files: tuple[Fingerprint, ...],
    device: torch.device,
) -> None:
    folder, samples = command.output / stage.name, Conversations(records, model)
    make_tracker = functools.partial(Tracker, wandb=command.wandb)
    if command.peak_tflops is not None:
        plan = make_plan(model.config, stage, len(samples), measure(samples, 64), world_size())
        peak = command.peak_tflops * 1e12 * world_size()
        make_tracker = functools.partial(make_tracker, flops_a_token=plan.flops_a_token, peak_flops=peak)
    asked = None
    if command.sample_every is not None:
        chosen = records[:: math.ceil(len(records) / command.samples)]
        asked = SampleAnswers(folder, chosen, command.sample_every, stage.precision)
    train_stage(model, stage, samples, collate, folder, device, asked, make_tracker, files, command.may_change)


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


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
