"""Models on disk and on the Hugging Face Hub: config, weights and tokenizer."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  the public base of connection errors
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor, nn

from .card import CARD, CardFacts, model_card
from .config_io import load_config
from .files import PARTIAL, expand_home, sync, write_atomic
from .quantize import (
    Quantization,
    check_devices,
    check_quantization,
    choose_bits,
    quantized_weights,
    replace_matrices,
    stored_bits,
)
from .transformers_files import CODE, GENERATION, save_model_config
from .weights import INDEX, WEIGHTS, DeviceMap, Weights, check_placement, load_into, open_weights, save_weights

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
PROCESSOR = "processor.json"
SMALL_FILES = (
    CONFIG,
    "params.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "*processor*.json",
    "*.index.json",
    "*/config.json",
)
"""Files to download besides weights."""
WEIGHT_FILES = (
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("consolidated.safetensors", "consolidated-*-of-*.safetensors"),
    ("open_clip_model.safetensors",),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
    ("open_clip_pytorch_model.bin",),
    ("*latest-checkpoint.pt",),
)
"""Files of weights. From a repository with several kinds, the first is downloaded."""

READY = ".vlmamba-new-model"
"""Folder with the complete files of a saved model that are not all moved to their final names yet."""
REPLACEMENT = "replacement.json"
"""File in `READY` with the names of all new files."""
LAST = (WEIGHTS + INDEX, CONFIG)
"""Files that are moved last, since they refer to the others."""
_MODEL_FILES = (
    CONFIG,
    CODE,
    GENERATION,
    TOKENIZER,
    "tokenizer_config.json",
    "processor_config.json",
    WEIGHTS,
    WEIGHTS + INDEX,
)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

M = TypeVar("M", bound="HubModel")


def fetch(
    name_or_path: str | Path,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Return a folder with the files of a model: the folder itself, or the Hub's snapshot of a repository.

    Args:
        name_or_path: a folder, or a repository such as `"state-spaces/mamba-130m"`.
        patterns: of the files wanted, as `"*.json"`; those that the cache lacks are downloaded.
        revision: branch, tag or commit; the newest of the main branch by default.
        cache_dir: download cache; the Hub's own (`HF_HOME`) by default.
        token: for private and gated repositories; the one of `hf auth login` by default.
        force_download: download again what the cache has.
        local_files_only: use the cache only, as `HF_HUB_OFFLINE=1` does.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: no such folder, repository or revision, or not in the cache where nothing may be downloaded.
        PermissionError: the repository is gated.
        ConnectionError: the Hub cannot be reached, or fails.
    """
    # A folder always comes before a repository of the same name.
    path = expand_home(name_or_path)
    if path.is_dir():
        finish_replacing(path)
        return path
    name = str(name_or_path)
    # Such a name can only be a path: do not ask the Hub for it.
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder at {name}")
    source = f"{name} at revision {revision!r}" if revision else name
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=list(patterns),
        )
    # The Hub's errors become built-in ones with the remedy in the message.
    except HFValidationError as e:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a name of the form 'owner/model'") from e
    except GatedRepoError as e:
        raise PermissionError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then run `hf auth login` or give "
            "token="
        ) from e
    except RevisionNotFoundError as e:
        raise FileNotFoundError(f"{name} has no revision {revision!r}: give a branch, a tag or a commit") from e
    except RepositoryNotFoundError as e:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a repository on the Hub that you may read. Check the spelling; for a "
            "private repository run `hf auth login` or give token="
        ) from e
    # HF_HUB_OFFLINE is set and the revision is not cached.
    except OfflineModeIsEnabled as e:
        raise FileNotFoundError(_not_cached(source)) from e
    except LocalEntryNotFoundError as e:
        # The Hub raises the same error for a missing cache entry and for a failed connection.
        if local_files_only or constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(_not_cached(source)) from e
        raise ConnectionError(
            f"the Hub cannot be reached, and {source} is not in the local cache: {_first_line(e)}"
        ) from e
    except (HfHubHTTPError, HTTPError) as e:
        raise ConnectionError(
            f"{source} could not be downloaded: {_first_line(e)}. Try again; finished files are cached"
        ) from e
    return Path(folder)


def fetch_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Fetch `SMALL_FILES` and one kind of weights: the first of `WEIGHT_FILES` that there is."""

    def get(patterns: Sequence[str]) -> Path:
        return fetch(
            name_or_path,
            patterns,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )

    # Small files first, then one kind of weights after the other until one exists.
    folder = get(SMALL_FILES)
    # A local folder has its weights already.
    if expand_home(name_or_path).is_dir():
        return folder
    for kind in WEIGHT_FILES:
        with contextlib.suppress(FileNotFoundError):  # offline, where the cache has another kind
            folder = get((CONFIG, *kind))
            if any(True for name in kind for _ in folder.rglob(name)):
                break
    return folder


def _not_cached(source: str) -> str:
    return (
        f"{source} is not in the local cache, or not all of it, and downloads are off (local_files_only, "
        "HF_HUB_OFFLINE). Download it once with them on, or check HF_HOME and cache_dir"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class HubModel(nn.Module, PyTorchModelHubMixin):
    """Model with a `config` dataclass, saved and loaded by name.

    `save_pretrained(folder)` and `push_to_hub(name)` are those of the Hub's mixin. The files of a model are replaced
    when all of the new ones are complete, so that an interrupted save leaves the previous model; other files in the
    folder stay.
    """

    config_class: ClassVar[type]
    config: Any

    @classmethod
    def from_pretrained(
        cls: type[M],
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device_map: DeviceMap = "cpu",
        quantize: Quantization | None = None,
    ) -> M:
        """Load a model from a folder or the Hub, ready for inference.

        Args:
            name_or_path: a folder, or a repository such as `"state-spaces/mamba-130m"`.
            revision, cache_dir, token, force_download, local_files_only: see `fetch`.
            dtype: of the weights; None keeps the file's. Parameters that a scan is most sensitive to stay float32.
            device_map: placement of the weights: a device, `"auto"` (a GPU if there is one), or a mapping from
                prefixes of parameter names to devices, such as `{"": "cpu", "backbone.layers.0": "cuda:0"}`; the
                longest matching prefix decides.
            quantize: hold the matrices of the language model and the encoders in 8 or 4 bits (`"int8"`, `"int4"`), as
                they are read, by torchao. None keeps the file's, which may be quantized.

        Returns:
            The model, in evaluation mode. Weights are loaded one after the other directly to their device: at most one
            file of them is in memory besides.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: see `fetch`; or the folder has no config or weights.
            ValueError: a file is damaged or incomplete, the format is not known, or weights and config do not agree; or
                the model that `quantize` is for is quantized already.
            ModuleNotFoundError: `quantize` needs the package `torchao`.
        """
        hub: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        # Before the download, which may take minutes.
        check_placement(dtype, device_map)
        check_quantization(quantize)
        folder = fetch_model(name_or_path, **hub)
        config, weights = cls.open_checkpoint(folder, **hub)
        # No memory until the weights arrive, each directly in its final dtype and place.
        with torch.device("meta"):
            model = cls(config)
        weights = model.make_quantized(weights, quantize, str(folder))
        check_devices(model, device_map)
        load_into(model, weights, str(folder), dtype, device_map)
        model.load_extras(folder, **hub)
        return model.eval()

    @classmethod
    def open_checkpoint(cls, folder: Path, **hub: Any) -> tuple[Any, Weights]:
        """Open a checkpoint without reading its weights.

        Args:
            folder: with config and weights.
            hub: as for `fetch`, for files in other repositories.

        Returns:
            The config, and the weights under the names of this class.
        """
        if not (folder / CONFIG).exists():
            raise FileNotFoundError(f"{folder} has no {CONFIG}, so what model it holds is unknown")
        return load_config(cls.config_class, folder / CONFIG), open_weights(folder)

    def quantizable(self) -> dict[str, int]:
        """Return the names of the modules that quantization changes, each with the least bits that it may have."""
        return {}

    def make_quantized(self, weights: Weights, quantize: Quantization | None, source: str) -> Weights:
        """Replace the modules that are quantized in weights, or are to be, by quantized ones.

        Args:
            weights: under the names of this class.
            quantize: see `from_pretrained`.
            source: origin of the weights, for messages.

        Returns:
            The weights for the changed model.

        Raises:
            ValueError: the weights are quantized already.
        """
        # What a file holds as integers is loaded as integers.
        if quantize is None:
            replace_matrices(self, stored_bits(weights))
            return weights
        bits = choose_bits(self, self.quantizable(), quantize, weights, source)
        replace_matrices(self, bits)
        return quantized_weights(weights, bits)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Save as the mixin does, but atomically, with a model card (`README.md`). An existing card stays, unless
        `model_card_kwargs` has facts for a new one.

        Args:
            save_directory: folder, made where it does not exist.
            kwargs: as for the mixin; `model_card_kwargs={"facts": CardFacts(...)}` adds to the card.

        Returns:
            URL of the commit with `push_to_hub`, else None.

        Raises:
            OSError: `save_directory` cannot hold a model, or the disk is full; its content is unchanged.
        """
        # The mixin would name the repository after the temporary folder.
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replacing_folder(save_directory) as staged:
            url = super().save_pretrained(staged, **kwargs)
            if (Path(save_directory) / CARD).exists() and not kwargs.get("model_card_kwargs"):
                (staged / CARD).unlink()
        return url

    def generate_model_card(  # pyright: ignore[reportIncompatibleMethodOverride]  the mixin passes what it is given
        self, facts: CardFacts | None = None
    ) -> ModelCard:
        """Write the model card; `save_pretrained` and `push_to_hub` save it.

        Args:
            facts: what the config does not have.

        Returns:
            The card.
        """
        return model_card(self, self.config, facts or CardFacts())

    def save_extras(self, folder: Path) -> None:
        """Write the files of the model besides weights and config.

        Args:
            folder: to write to.
        """

    def load_extras(self, folder: Path, **hub: Any) -> None:
        """Read the files that `save_extras` wrote.

        Args:
            folder: of the checkpoint.
            hub: as for `fetch`, for files in other repositories.
        """

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = unshared(self)
        save_model_config(self.config, save_directory, {name: t.dtype for name, t in weights.items()})
        save_weights(weights, save_directory)
        self.save_extras(save_directory)


def unshared(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with each tensor once, tied parameters under their first name."""
    # safetensors refuses tensors that share memory.
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().contiguous()
    return state


@contextlib.contextmanager
def replacing_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder whose files replace those of the model in `target` when the block succeeds.

    Other files in `target` stay. New files are written inside `target` and synced before one rename marks them as
    complete; then each is renamed to its final name. A process killed before the mark leaves the old model. One killed
    after it leaves the new model: the next reader or writer finishes the renames (`finish_replacing`).

    Args:
        target: a folder, a link to one, or a mount point; made where it does not exist.

    Raises:
        OSError: `target` cannot hold a model; or from the block, with a note that `target` is unchanged.
    """
    check_replaceable(target)
    target = Path(os.path.realpath(target))
    # A folder made here is removed again if the save fails.
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    finish_replacing(target)
    # Inside the target: the same file system, so that files can be renamed.
    staged = target / f".{secrets.token_hex(4)}{PARTIAL}"
    staged.mkdir()
    try:
        yield staged
        new = [file for file in staged.rglob("*") if file.is_file()]
        for file in new:
            sync(file)
        # Index and config last: a reader that finds them finds the files that they refer to.
        names = sorted((file.relative_to(staged).as_posix() for file in new), key=lambda n: (n in LAST, n))
        write_atomic(staged / REPLACEMENT, json.dumps(names))
        sync(staged)
        # The mark: from here on the new model is the one that counts.
        os.replace(staged, target / READY)
        sync(target)
        finish_replacing(target)
    except OSError as e:
        # Past the mark, the error must not claim that the old model is still there.
        if (target / READY).exists():
            raise OSError(
                e.errno, f"{target} holds the new model, of which not all files have their final names: {e.strerror}"
            ) from e
        raise OSError(e.errno, f"could not save {target}, which is as it was before: {e.strerror or e}") from e
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # it holds a model
                target.rmdir()


def check_replaceable(target: str | Path) -> None:
    """Check that a model can be saved in a folder.

    Raises:
        NotADirectoryError: it is a file, or inside one.
        IsADirectoryError: it has a folder with the name of a model's file.
        PermissionError: it may not be written.
    """
    target = Path(os.path.realpath(target))
    # The closest existing folder decides whether the missing ones can be made.
    there = next(p for p in (target, *target.parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{target} must be a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"a model cannot be saved in {target}: {there} may not be written")
    if there == target:
        folders = [p.name for p in target.iterdir() if is_model_file(p.name) and p.is_dir()]
        if folders:
            raise IsADirectoryError(errno.EISDIR, f"{target} has a folder in the place of the file {folders[0]}")


def finish_replacing(target: Path) -> None:
    """Finish a save that was interrupted after all new files were complete: rename them to their final names.

    Raises:
        PermissionError: this user may not write there.
        ValueError: the folder names files outside of it.
    """
    ready = target / READY
    if not ready.is_dir():
        return
    try:
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            names = json.loads((ready / REPLACEMENT).read_text(encoding="utf-8"))
            # The list may have been written by someone else: never rename outside of the folder.
            inside = target.resolve()
            for name in names:
                place = (target / name).parent
                if not place.resolve().is_relative_to(inside) or not ready.resolve().is_relative_to(inside):
                    raise ValueError(f"{ready / REPLACEMENT} names a file outside of {target}: {name!r}")
                place.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    os.replace(ready / name, target / name)
            # Files of the old model that the new one lacks, such as further shards.
            for file in target.iterdir():
                if is_model_file(file.name) and file.name not in names:
                    file.unlink()
            sync(target)
            (ready / REPLACEMENT).unlink()
        shutil.rmtree(ready, ignore_errors=True)
    except PermissionError as e:
        raise PermissionError(
            e.errno, f"a save of {target} was interrupted, and only who may write there can finish it: {e.strerror}"
        ) from e


def is_model_file(name: str) -> bool:
    """Return whether a file of that name belongs to a model that this library, or `transformers`, saves."""
    return name in _MODEL_FILES or bool(_SHARD.fullmatch(name))
