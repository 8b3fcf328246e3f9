"""Adapters for evaluation harnesses. Each needs the extra of the harness's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..generation.config import GenerationConfig
from ..lm import MambaLM
from ..vlm import VLM

_MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


M = TypeVar("M", MambaLM, VLM)


def load(kind: type[M], pretrained: str | M, revision: str | None, dtype: str | None, device: str | None) -> M:
    """Load a model from the arguments of a harness's `--model_args`.

    Args:
        kind: class of the model.
        pretrained: name or folder; or a loaded model.
        revision: of the repository.
        dtype: name of the dtype; the checkpoint's own by default.
        device: a GPU by default, where there is one.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: `dtype` is not the name of a floating-point dtype; the model has no tokenizer; or it is loaded
            already, and there are arguments for loading it.
    """
    if isinstance(pretrained, kind):
        if any(x is not None for x in (revision, dtype, device)):
            raise ValueError("revision, dtype and device are for a model that is loaded, but pretrained is a model")
        model = pretrained
    else:
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = kind.from_pretrained(pretrained, revision=revision, dtype=_parse_dtype(dtype), device_map=target)
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
    """Parse the number of requests per batch.

    Raises:
        ValueError: not a positive integer.
    """
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"batch_size must be a positive integer, got {value!r}")
    return int(value)


def generation_config(kwargs: Mapping, max_new_tokens: int) -> GenerationConfig:
    """Convert a task's generation arguments.

    Args:
        kwargs: `until`, the number of tokens by any of its four names, `do_sample`, `temperature`, `top_k`, `top_p`,
            `repetition_penalty`, `seed`, `num_beams`. Without `do_sample`, a temperature above 0 means sampling.
        max_new_tokens: default of the task's number of tokens.

    Raises:
        ValueError: an argument that is not known, or more than one beam.
    """
    options = {name: value for name, value in kwargs.items() if value is not None}
    # Names of the limit differ between harnesses and tasks.
    limits = [options.pop(name) for name in _MAX_NEW_TOKENS if name in options]
    until = options.pop("until", ())
    until = [until] if isinstance(until, str) else until
    temperature = float(options.pop("temperature", 1.0 if options.get("do_sample") else 0.0))
    # do_sample=False takes precedence over any temperature.
    if not options.pop("do_sample", True):
        temperature = 0.0
    if options.pop("num_beams", 1) != 1:
        raise ValueError(f"num_beams must be 1: there is no beam search; got {kwargs['num_beams']}")
    sampling = {name: options.pop(name) for name in ("top_k", "top_p", "seed") if name in options}
    penalty = {"repetition_penalty": options.pop("repetition_penalty")} if "repetition_penalty" in options else {}
    if options:
        raise ValueError(f"generation arguments that are not known: {', '.join(sorted(options))}")
    return GenerationConfig(
        max_new_tokens=int(limits[0]) if limits else max_new_tokens,
        temperature=temperature,
        stop=tuple(text for text in until if text),
        **(sampling if temperature else {}),
        **penalty,
    )


def generation_batches(
    requests: Sequence[tuple[Any, Mapping]], max_new_tokens: int, batch_size: int
) -> Iterator[tuple[GenerationConfig, list[int]]]:
    """Group requests into batches with one generation config each.

    A prompt that repeats with the same arguments, as in a task that votes among samples, takes the next seed.

    Args:
        requests: prompts with their generation arguments.
        max_new_tokens: default number of tokens.
        batch_size: most requests of a batch.

    Yields:
        Configs, and the indices of the requests of the batch.

    Raises:
        ValueError: see `generation_config`; before the first batch.
    """
    by_config: dict[GenerationConfig, list[int]] = {}
    repeats: Counter = Counter()
    for i, (prompt, kwargs) in enumerate(requests):
        config = generation_config(kwargs, max_new_tokens)
        # Greedy repeats are equal anyway.
        if config.temperature:
            repeat = repeats[prompt, config]
            repeats[prompt, config] += 1
            config = replace(config, seed=config.seed + repeat)
        by_config.setdefault(config, []).append(i)
    for config, indices in by_config.items():
        for start in range(0, len(indices), batch_size):
            yield config, indices[start : start + batch_size]
