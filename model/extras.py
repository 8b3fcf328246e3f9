"""Optional packages, and the command that installs what is missing."""

from __future__ import annotations

import shlex

PACKAGES: dict[str, tuple[str, ...]] = {
    "lm-eval": ("lm-eval>=0.4.13",),
    "lmms-eval": ("lmms-eval>=0.7.3",),
    "onnx": ("onnx", "onnxscript"),
    "quantize": ("torchao>=0.18",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "transformers": ("transformers>=5.20", "accelerate", "peft"),
}
"""Requirements of the extras that an error message names, as in `pyproject.toml`."""

NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers that warn, when `torchao` is imported, of its libraries for other machines and of names that PyTorch will
drop; neither says anything to a user of this package. transformers imports it too, where it is installed."""


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra.

    The packages are named, not the extra, whose name pip would look up on PyPI, where this package is not.

    Args:
        extra: a key of `PACKAGES`.

    Returns:
        the command, for example `pip install 'torchao>=0.18'`.
    """
    return shlex.join(["pip", "install", *PACKAGES[extra]])
