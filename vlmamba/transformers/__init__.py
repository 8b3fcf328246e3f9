"""This library's models as models of `transformers`. Importing this module registers them.

.. code-block:: python

    import vlmamba.transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained("runs/mine/model")
    processor = AutoProcessor.from_pretrained("runs/mine/model")

The classes hold a `VLM` or a `MambaLM`: parameters have the same names, and files are the same. Batches run packed, so
that padding changes nothing; the cache of `generate` is the recurrent state.
"""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

MINIMUM = Version("5.20")
"""Earliest release of `transformers` that is supported."""

try:
    _VERSION = Version(importlib.metadata.version("transformers"))
except importlib.metadata.PackageNotFoundError as e:
    raise ImportError(
        f"vlmamba.transformers needs the transformers package: pip install 'transformers>={MINIMUM}'"
    ) from e
if _VERSION < MINIMUM:
    raise ImportError(f"vlmamba.transformers needs transformers {MINIMUM} or later, and {_VERSION} is installed")

from . import quantizer  # noqa: E402, F401  registered by the import
from .configs import MambaLMConfig, VLMambaConfig  # noqa: E402
from .models import MambaLMForCausalLM, RecurrentCache, VLMambaForConditionalGeneration  # noqa: E402
from .processor import VLMambaProcessor  # noqa: E402
from .registration import register  # noqa: E402

__all__ = [
    "MambaLMConfig",
    "MambaLMForCausalLM",
    "RecurrentCache",
    "VLMambaConfig",
    "VLMambaForConditionalGeneration",
    "VLMambaProcessor",
]

register()
