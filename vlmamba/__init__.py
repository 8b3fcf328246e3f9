"""Vision-language models on state-space language models: `vlmamba.model`, `connectors`, `train`, `benchmarks`.

The names most often needed are here as well, and are imported when they are first used: `import vlmamba` itself
imports no torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import (
        VLM,
        Conversation,
        GenerationConfig,
        ImageProcessor,
        LMConfig,
        MambaLM,
        Tokenizer,
        VLMConfig,
        load_model,
    )

    __version__: str

__all__ = [
    "VLM",
    "Conversation",
    "GenerationConfig",
    "ImageProcessor",
    "LMConfig",
    "MambaLM",
    "Tokenizer",
    "VLMConfig",
    "__version__",
    "load_model",
]

_SUBPACKAGES = ("benchmarks", "commands", "connectors", "model", "serve", "train", "transformers")

# A wheel holds the subpackages in this folder, a checkout beside it. With the parent on the path, a checkout imports
# its own subpackages from any working directory, whichever checkout is installed in editable mode.
_FOLDER = Path(__file__).parent
if not (_FOLDER / "model").is_dir():
    __path__.append(str(_FOLDER.parent))


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name == "__version__":
        from importlib.metadata import version

        value = version("vl-mamba")
    elif name in __all__:
        value = getattr(importlib.import_module(".model", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
