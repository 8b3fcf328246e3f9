"""Conversion of models between layouts, without loading them into memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .card import CARD, facts_of, model_card
from .config import LMConfig, VLMConfig
from .files import expand_home, remove_partials
from .formats import detect_format, language
from .formats.vlm import write_released
from .hub import CONFIG, TOKENIZER, fetch_model, replacing_folder
from .lm import MambaLM, neox_tokenizer
from .load import model_class
from .quantize import Quantization, check_quantization, replace_matrices, stored_bits
from .tokenizer import CONFIG as TOKENIZER_CONFIG
from .tokenizer import Tokenizer
from .transformers_files import GENERATION, save_model_config, save_special_tokens
from .vlm import VLM
from .weights import LazyTensor, Weights, check_placement, dtype_of, save_weights

Layout = Literal["own", "state-spaces", "transformers", "released"]
LAYOUTS: dict[Layout, str] = {
    "own": "any model",
    "state-spaces": "a language model",
    "transformers": "a language model",
    "released": "a vision-language model",
}
"""Layouts, and the models that each can hold."""
_IN_WORDS: dict[Layout, str] = {
    "own": "the layout of vl-mamba",
    "state-spaces": "the layout of `mamba_ssm` (`MambaLMHeadModel.from_pretrained` loads it)",
    "transformers": "the layout of `transformers` (`AutoModelForCausalLM.from_pretrained` loads it)",
    "released": "the layout of the releases of Cobra and ML-Mamba",
}

CARRIED = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", GENERATION)
"""Files that are equal in every layout, and copied."""


def convert(
    src: str | Path,
    dst: str | Path,
    to: Layout = "own",
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
    **hub: Any,
) -> LMConfig | VLMConfig:
    """Convert a model to another layout.

    Args:
        src: a folder, or a repository on the Hub: a language model in any layout of `formats.language`, or a
            vision-language model in this library's or a released one.
        dst: the folder to write; it must not exist, or be empty.
        to: `"own"` (`config.json`, `model.safetensors`), `"state-spaces"` (`pytorch_model.bin`, for `mamba_ssm`),
            `"transformers"`, or `"released"`, as Cobra and ML-Mamba are (see `formats.vlm`; encoders are left out).
        dtype: of the weights; None keeps each. Parameters that a scan is most sensitive to stay at least float32.
        quantize: hold matrices in 8 or 4 bits, for `to="own"` alone; see `model.quantize`.
        hub: `revision`, `cache_dir`, `token`, `force_download` and `local_files_only` as for `hub.fetch`.

    Returns:
        The model's config. Weights are read and written file by file; a pickle is one file, and needs the entire model
        in memory (mapped from the source if `dtype` does not change it). `dst` appears when it is complete.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: see `hub.fetch`.
        FileExistsError: `dst` has files in it.
        ValueError: the source is not what `to` is for, is damaged, or has a setting that `to` cannot hold; or it is
            quantized already, or `to` cannot hold quantized weights.
        ModuleNotFoundError: `quantize` needs the package `torchao`.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to must be one of {', '.join(map(repr, LAYOUTS))}; got {to!r}")
    check_placement(dtype, "cpu")
    check_quantization(quantize)
    if quantize is not None and to != "own":
        raise ValueError(f"quantize is for to = 'own', whose files hold integers and scales; got to = {to!r}")
    dst = expand_home(dst)
    # An interrupted conversion may have left an incomplete folder.
    if dst.is_dir():
        remove_partials(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise FileExistsError(f"{dst} exists and is not empty: give the name of a new folder")
    folder = fetch_model(src, **hub)
    if (kind := model_class(folder)) is VLM:
        return _convert_vlm(folder, src, dst, to, dtype, quantize, hub)
    if to == "released":
        raise ValueError(f"to = 'released' is for {LAYOUTS[to]}, and {src} is a {kind.__name__}")
    config, weights = language.open_language_model(folder)
    weights = _changed(_untied(weights, config, folder), MambaLM, config, to, dtype, quantize, folder)
    special = language.special_tokens(folder)
    with replacing_folder(dst) as staged:
        if to == "own":
            save_model_config(config, staged, weights.dtypes)
            save_weights(weights, staged)
        elif to == "state-spaces":
            (staged / CONFIG).write_text(language.dump(language.to_state_spaces(config)), encoding="utf-8")
            torch.save(_with_head(weights, config), staged / "pytorch_model.bin")
        else:
            dtype_name = str(weights.dtypes[language.EMBEDDING]).removeprefix("torch.")
            data = language.to_transformers(config, special) | {"dtype": dtype_name}
            (staged / CONFIG).write_text(language.dump(data), encoding="utf-8")
            save_weights(weights.renamed(language.transformers_name), staged)
        for name in CARRIED:
            if (folder / name).exists():
                shutil.copyfile(folder / name, staged / name)
        if special and not (staged / GENERATION).exists():
            (staged / GENERATION).write_text(language.dump(special), encoding="utf-8")
        if to == "own":
            _complete_tokenizer(staged)
        _write_card(staged, folder, src, to, MambaLM, config, stored_bits(weights))
    return config


def _convert_vlm(
    folder: Path,
    src: str | Path,
    dst: Path,
    to: Layout,
    dtype: torch.dtype | None,
    quantize: Quantization | None,
    hub: dict[str, Any],
) -> VLMConfig:
    if to not in ("own", "released"):
        raise ValueError(f"to = {to!r} is for {LAYOUTS[to]}, and {folder} is a vision-language model")
    config, weights = VLM.open_checkpoint(folder, **hub)
    if config.language.tie_embeddings:
        head, embedding = (f"language_model.{name}" for name in (language.LM_HEAD, language.EMBEDDING))
        if head in weights and embedding in weights:  # equal, since the config was made from them or saved with them
            weights = weights.renamed({head: None})
    weights = _changed(weights, VLM, config, to, dtype, quantize, folder)
    with replacing_folder(dst) as staged:
        if to == "released":
            write_released(config, weights, staged, dst.resolve().name)
        else:
            save_model_config(config, staged, weights.dtypes)
            save_weights(weights, staged)
        if (folder / TOKENIZER).exists():
            for name in CARRIED:
                if (folder / name).exists():
                    shutil.copyfile(folder / name, staged / name)
        elif detect_format(folder) != "own" and (tokenizer := neox_tokenizer(**hub)) is not None:
            tokenizer.save(staged / TOKENIZER)
        if to == "own":
            _complete_tokenizer(staged)
        _write_card(staged, folder, src, to, VLM, config, stored_bits(weights))
    return config


def _complete_tokenizer(staged: Path) -> None:
    """Write the settings of a tokenizer that its source lacks."""
    if not (staged / TOKENIZER).exists():
        return
    missing = [name for name in (TOKENIZER_CONFIG, GENERATION) if not (staged / name).exists()]
    if missing:
        tokenizer = Tokenizer.from_file(staged / TOKENIZER)
        if TOKENIZER_CONFIG in missing:
            tokenizer.save_settings(staged / TOKENIZER_CONFIG)
        if GENERATION in missing:
            save_special_tokens(tokenizer, staged)


def _write_card(
    staged: Path,
    folder: Path,
    src: str | Path,
    to: Layout,
    kind: type[MambaLM] | type[VLM],
    config: LMConfig | VLMConfig,
    bits: dict[str, int],
) -> None:
    """Copy the source's card, which knows more, or write one; either says what the layout is."""
    layout = f"## Layout\n\nConverted to {_IN_WORDS[to]} by `vlmamba convert`."
    if bits:
        layout += f" Matrices hold integers of {' and '.join(map(str, sorted(set(bits.values()))))} bits, with scales."
    # A snapshot of the Hub may or may not have its card, so that only a folder's is copied.
    if expand_home(src).is_dir() and (folder / CARD).exists():
        # Without the section of an earlier conversion, which is the last one.
        text = (folder / CARD).read_text(encoding="utf-8").partition("\n## Layout\n")[0].rstrip()
        (staged / CARD).write_text(f"{text}\n\n{layout}\n", encoding="utf-8")
        return
    # Parameters are counted, so no memory is needed.
    with torch.device("meta"):
        model = kind(config)  # pyright: ignore[reportArgumentType]  the config of that kind
    replace_matrices(model, bits)
    model_card(model, config, replace(facts_of(src), sections=[layout])).save(staged / CARD)


def _untied(weights: Weights, config: LMConfig, folder: Path) -> Weights:
    """Drop the head if it is the embedding: the layouts disagree on whether that is stored."""
    if not config.tie_embeddings or language.LM_HEAD not in weights:
        return weights
    if not torch.equal(weights[language.LM_HEAD], weights[language.EMBEDDING]):
        raise ValueError(f"{folder}: the head is to be the embedding by the config, but differs from it in the weights")
    return weights.renamed(lambda name: None if name == language.LM_HEAD else name)


def _changed(
    weights: Weights,
    kind: type[MambaLM] | type[VLM],
    config: LMConfig | VLMConfig,
    to: Layout,
    dtype: torch.dtype | None,
    quantize: Quantization | None,
    folder: Path,
) -> Weights:
    """Cast and quantize lazily."""
    if to != "own" and stored_bits(weights):
        raise ValueError(f"{folder} is quantized, which to = {to!r} cannot hold: convert the model it was made from")
    if quantize is not None:
        # For the names of the matrices.
        with torch.device("meta"):
            model = kind(config)  # pyright: ignore[reportArgumentType]  the config of that kind
        weights = model.make_quantized(weights, quantize, str(folder))
    return _in_dtype(weights, dtype)


def _in_dtype(weights: Weights, dtype: torch.dtype | None) -> Weights:
    """Cast lazily: each tensor when it is read."""
    if dtype is None:
        return weights

    def cast(name: str) -> LazyTensor:
        tensor = weights.lazy(name)
        new = dtype_of(name, tensor.dtype, dtype)
        return LazyTensor(tensor.shape, new, lambda: tensor.read().to(new))

    return Weights({name: cast(name) for name in weights})


def _with_head(weights: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Return all tensors including the head, which `mamba_ssm` requires, tied or not."""
    state = dict(weights)
    if config.tie_embeddings:
        state[language.LM_HEAD] = state[language.EMBEDDING]
    return state
