"""Adapters for the field's evaluation harnesses. Each needs the extra of its harness's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from ..generation.config import GenerationConfig
from ..lm import MambaLM
from ..vlm import VLM

_MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


M = TypeVar("M", MambaLM, VLM)


def load(kind: type[M], pretrained: str | M, revision: str | None, dtype: str | None, device: str | None) -> M:
    """A model by the arguments of a harness's `--model_args`, on a GPU by default, where there is one.

    Raises:
        ValueError: `dtype` is not the name of a floating-point dtype; the model has no tokenizer; or it is there
            already, and there are arguments for loading it.
    """
    if isinstance(pretrained, kind):
        if any(x is not None for x in (revision, dtype, device)):
            raise ValueError("revision, dtype and device are for a model that is loaded, but pretrained is a model")
        model = pretrained
    else:
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = kind.from_pretrained(pretrained, revision=revision, dtype=_parse_dtype(dtype), device_map=place)
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: put its tokenizer.json beside the weights")
    return model.eval()


def _parse_dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be the name of a floating-point dtype, such as bfloat16; got {name!r}")
    return dtype


def parse_batch_size(value: int | str) -> int:
    """Requests that are run together.

    Raises:
        ValueError: not a positive integer.
    """
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"batch_size must be a positive integer, got {value!r}")
    return int(value)


def generation_config(kwargs: Mapping, max_new_tokens: int) -> GenerationConfig:
    """A task's generation arguments as ours.

    Args:
        kwargs: `until`, the number of tokens by any of its four names, `do_sample`, `temperature`, `top_k`, `top_p`,
            `repetition_penalty`, `seed`, `num_beams`. Without `do_sample`, a temperature above 0 means drawing.
        max_new_tokens: where the task does not say.

    Raises:
        ValueError: an argument that is not known, or more than one beam.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    limits = [given.pop(name) for name in _MAX_NEW_TOKENS if name in given]
    until = given.pop("until", ())
    until = [until] if isinstance(until, str) else until
    temperature = float(given.pop("temperature", 1.0 if given.get("do_sample") else 0.0))
    if not given.pop("do_sample", True):
        temperature = 0.0
    if given.pop("num_beams", 1) != 1:
        raise ValueError(f"num_beams must be 1: there is no beam search; got {kwargs['num_beams']}")
    drawing = {name: given.pop(name) for name in ("top_k", "top_p", "seed") if name in given}
    penalty = {"repetition_penalty": given.pop("repetition_penalty")} if "repetition_penalty" in given else {}
    if given:
        raise ValueError(f"generation arguments that are not known: {', '.join(sorted(given))}")
    return GenerationConfig(
        max_new_tokens=int(limits[0]) if limits else max_new_tokens,
        temperature=temperature,
        stop=tuple(text for text in until if text),
        **(drawing if temperature else {}),
        **penalty,
    )


def generation_batches(
    requests: Sequence[tuple[object, Mapping]], max_new_tokens: int, batch_size: int
) -> Iterator[tuple[GenerationConfig, list[int]]]:
    """Requests, each a prompt and its generation arguments, in batches of one configuration, by their indices.

    A prompt that comes again with the same arguments, as in a task that votes among draws, is drawn with another seed.

    Raises:
        ValueError: as `generation_config`, before the first batch.
    """
    together: dict[GenerationConfig, list[int]] = {}
    draws: Counter = Counter()
    for i, (prompt, kwargs) in enumerate(requests):
        config = generation_config(kwargs, max_new_tokens)
        if config.temperature:
            draw = draws[prompt, config]
            draws[prompt, config] += 1
            config = replace(config, seed=config.seed + draw)
        together.setdefault(config, []).append(i)
    for config, indices in together.items():
        for start in range(0, len(indices), batch_size):
            yield config, indices[start : start + batch_size]
