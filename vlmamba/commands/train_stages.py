"""Execution of `vlmamba train`: checks, the dry run, and the stages one after the other."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from ..model.batch import collate
from ..model.device import device_named
from ..model.files import remove_partials
from ..model.hub import check_replaceable
from ..model.presets import is_preset
from ..model.quantize import check_quantization, dequantize_model, is_quantized
from ..model.tokenizer import Tokenizer
from ..model.vlm import VLM
from ..train.base_model import check_checkpoint, model_config, model_without_weights, named_model, template_of
from ..train.card import TrainedStage, card_facts
from ..train.config import StageConfig
from ..train.distributed import on_first_rank, processes, rank, world_size
from ..train.identity import Fingerprint, check_changeable, fingerprint
from ..train.lock import only_run_in
from ..train.loop import train_stage
from ..train.plan import RoughTokenizer, disk_problem, make_plan, measure
from ..train.recipes import RECIPES, DataFile, Recipe, recipe_for, recipe_named
from ..train.records import Records, read_llava
from ..train.samples import Conversations
from ..train.track import SampleAnswers, Tracker

if TYPE_CHECKING:
    from .train import Train

StageName = Literal["align", "finetune"]
File = tuple[Path, Path | None]
"""Annotations, and the folder or archive that their image paths are relative to."""


def run_training(command: Train) -> None:
    """Run `vlmamba train`.

    Raises:
        ValueError, OSError: an error in the options or the data, before anything is trained.
    """
    _check(command)
    device = device_named(command.device)
    with processes(device) as local_device:
        _run(command, local_device)


def _run(command: Train, device: torch.device) -> None:
    model = named_model(command.model)
    config = model_config(model)
    name = command.recipe or recipe_for(config)
    recipe = recipe_named(name)
    # Everything that can be wrong is looked up first: paths of all stages, then their records, then the model.
    stage_files = [(stage, _files(command, recipe, stage.name)) for stage in _stages(command, recipe)]
    print_once(f"model {model}, recipe {name}")
    data = [
        (stage, read_llava([f for f, _ in files], [i for _, i in files], stage.max_broken))
        for stage, files in stage_files
    ]
    for stage, records in data:
        print_once(f"stage {stage.name}: {records}")
    for stage, records in data:
        if not len(records):
            raise ValueError(f"stage {stage.name} has nothing to train on: no records in {_listed(records.paths)}")
    if command.dry_run:
        _dry_run(command, model, recipe, data)
        return
    # Found out now, not after hours of training.
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
    check_quantization(command.quantize)
    if command.quantize is not None and world_size() > 1:
        raise ValueError(f"--quantize is for training by one process, got {world_size()}")
    if (command.output / "model").resolve() == Path(command.model).resolve():
        raise ValueError(
            f"--output {command.output} would replace the model that training starts from: name another folder"
        )
    n_images = len(command.loading.images)
    if n_images and n_images not in (1, len(command.data)):
        raise ValueError(
            f"--images must be one for all data or one for each of {len(command.data)} files, got {n_images}"
        )


def _stages(command: Train, recipe: Recipe) -> list[StageConfig]:
    """Stages that the command selects, with its overrides."""
    names: Sequence[StageName] = ("align", "finetune") if command.stage == "both" else (command.stage,)
    given = command.overrides()
    lora = command.lora.config()
    if lora is not None and "finetune" not in names:
        raise ValueError("--lora is for the finetune stage: align does not train the language model")
    if command.quantize is not None and lora is None and "finetune" in names:
        raise ValueError(f"--quantize {command.quantize} needs --lora.rank: quantized weights have no gradients")
    stages = [replace(getattr(recipe, name), **given) for name in names]
    return [replace(s, lora=lora) if s.name == "finetune" else s for s in stages]


def _files(command: Train, recipe: Recipe, stage: str) -> tuple[File, ...]:
    """Annotation files of a stage, each with its images."""
    if command.data:
        images = command.loading.images or (None,)
        return tuple(zip(command.data, images * (len(command.data) if len(images) == 1 else 1), strict=True))
    own: tuple[DataFile, ...] = getattr(recipe, f"{stage}_data")
    root = command.loading.root
    if not own:
        raise ValueError("name DATA, files of conversations: the recipe has none of its own")
    for file in own:
        for path in (root / file.annotations, root / file.images):
            if not path.exists():
                raise FileNotFoundError(f"no {path}, which stage {stage} trains on. Get it from {file.source}")
    return tuple((root / file.annotations, root / file.images) for file in own)


def _dry_run(command: Train, name: str, recipe: Recipe, data: Sequence[tuple[StageConfig, Records]]) -> None:
    local = {"local_files_only": True} if is_preset(name) else {}
    model = model_without_weights(name, **local)
    notes = check_checkpoint(name, model)
    if model.tokenizer is None:
        notes.append("the tokenizer is not here; a token is estimated as four characters")
        model.tokenizer = cast(Tokenizer, RoughTokenizer())  # samples are measured, nothing else
    plans = []
    for stage, records in data:
        with template_of(recipe, stage, model):
            size = measure(Conversations(records, model))
        plans.append(make_plan(model.config, stage, len(records), size, world_size(), command.quantize))
        print_once(str(plans[-1]))
    for note in notes:
        print_once(f"note: {note}")
    problem = disk_problem(command.output, plans)
    if problem is not None:
        raise OSError(problem)
    print_once("data and checkpoints are in order; nothing was trained")


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
    # Rank 0 sends the other ranks their shards.
    model = load(name, quantize=command.quantize) if rank() == 0 else model_without_weights(name)
    done = []
    for stage, records in data:
        files = tuple(on_first_rank(lambda records=records: [fingerprint(path) for path in records.paths]))
        with template_of(RECIPES[recipe_name], stage, model):
            _train_stage(command, model, stage, records, files, device)
        done.append(TrainedStage(stage, len(records), files, command.output / stage.name))
    if rank() == 0:
        facts = card_facts(name, recipe_name, done)
        if is_quantized(model):
            print_once(
                "adapters are merged into dequantized weights; `vlmamba convert --quantize` quantizes them again"
            )
            dequantize_model(model)
        model.cpu().eval().save_pretrained(command.output / "model", model_card_kwargs={"facts": facts})
    print_once(_next_steps(command.output / "model", data[-1][1]))


def _next_steps(model: Path, records: Records) -> str:
    """Say where the model is, and how to talk to it about an image of the data."""
    image = next((image for image in records[0].images if isinstance(image, Path)), None)
    words = ["vlmamba", "chat", str(model), *([] if image is None else ["--image", str(image)])]
    return f"saved {model}. Chat with it:\n  {shlex.join(words)}"


def _train_stage(
    command: Train,
    model: VLM,
    stage: StageConfig,
    records: Records,
    files: tuple[Fingerprint, ...],
    device: torch.device,
) -> None:
    folder, samples = command.output / stage.name, Conversations(records, model)
    make_tracker = functools.partial(Tracker, wandb=command.logging.wandb)
    if command.logging.peak_tflops is not None:
        # FLOPs a token, from a few samples; utilization needs no more.
        plan = make_plan(model.config, stage, len(samples), measure(samples, 64), world_size())
        peak = command.logging.peak_tflops * 1e12 * world_size()
        make_tracker = functools.partial(make_tracker, flops_per_token=plan.flops_per_token, peak_flops=peak)
    on_step = None
    if command.logging.sample_every is not None:
        # Evenly spaced over the data.
        chosen = records[:: math.ceil(len(records) / command.logging.samples)]
        on_step = SampleAnswers(folder, chosen, command.logging.sample_every, stage.precision)
    train_stage(model, stage, samples, collate, folder, device, on_step, make_tracker, files, command.may_change)


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def print_once(text: str) -> None:
    """Print on rank 0 alone."""
    if rank() == 0:
        print(text, flush=True)
