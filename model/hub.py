"""Models on disk and on the Hugging Face Hub: `config.json`, `model.safetensors`, and what else a model brings."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config_io import from_json_dict, save_config

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class HubModel(nn.Module, PyTorchModelHubMixin):
    """A model with a `config` dataclass, saved and loaded by the Hub's own mixin.

    `save_pretrained(folder)`, `from_pretrained(name_or_folder)` and `push_to_hub(name)` are the mixin's. A folder is
    replaced as a whole when it is complete, so that an interrupted save leaves the one before.
    """

    config_class: ClassVar[type]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """As the mixin's, but all or nothing."""
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replacing_folder(save_directory) as staged:
            return super().save_pretrained(staged, **kwargs)

    def save_extras(self, folder: Path) -> None:
        """Write what belongs to the model besides weights and config."""

    def load_extras(self, folder: Path) -> None:
        """Read what `save_extras` wrote."""

    def _save_pretrained(self, save_directory: Path) -> None:
        save_config(self.config, save_directory / CONFIG)
        save_file(unshared(self), save_directory / WEIGHTS, metadata={"format": "pt"})
        self.save_extras(save_directory)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: dict | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ):
        if config is None:
            raise FileNotFoundError(f"{model_id} has no {CONFIG}, so what model it holds is unknown")
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        model = cls(from_json_dict(cls.config_class, config))
        load_weights(model, read_weights(folder / WEIGHTS), str(folder / WEIGHTS))
        model.load_extras(folder)
        return model.to(device=device, dtype=dtype).eval()


def unshared(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once: of tied parameters, the first name."""
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach().contiguous()
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or cut short.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged or incomplete: {e}") from e


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model, strictly.

    Raises:
        ValueError: lists every name that is missing, unexpected, or of another shape.
    """
    own = model.state_dict(keep_vars=True)
    tied = {id(own[name]) for name in own if name in weights}
    problems = [f"missing: {n}" for n, t in own.items() if n not in weights and id(t) not in tied]
    problems += [f"unexpected: {n}" for n in weights if n not in own]
    problems += [
        f"shape of {n}: {tuple(weights[n].shape)} in the file, {tuple(t.shape)} in the model"
        for n, t in own.items()
        if n in weights and weights[n].shape != t.shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


@contextlib.contextmanager
def replacing_folder(target: str | Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `target` when the block ends well, and is gone when it does not.

    Raises:
        OSError: as the block raised it, with a note that `target` is untouched.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
        staged.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old)
            os.replace(staged, target)
            shutil.rmtree(old)
        else:
            os.replace(staged, target)
    except OSError as e:
        raise OSError(e.errno, f"could not save {target}, which is as it was before: {e.strerror}") from e
    finally:
        shutil.rmtree(staged, ignore_errors=True)
