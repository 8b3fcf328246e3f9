"""Builds this package as a kernel repository of the Hub, in the layout that `kernels.get_kernel` loads.

.. code-block:: shell

    python -m ssm_kernels.integrations.hub_kernel OUT

.. code-block:: python

    kernels.get_local_kernel(Path("OUT")).ssd(...)

The `KernelConfig` of `transformers` refers to the classes of `ssm_kernels.layers` in it:

.. code-block:: python

    names = "causal_conv1d_fn causal_conv1d_update selective_scan_fn selective_state_update mamba_inner_fn".split()
    config = KernelConfig({name: f"/abs/OUT:{name}" for name in names}, use_local_kernel=True)
    MambaForCausalLM.from_pretrained(model, use_kernels=True, kernel_config=config)

Versions 5.23 and 5.24 do so with `kernels` 0.18.2 or later and on a GPU only; on a CPU, use
`ssm_kernels.integrations.transformers`.

A folder for each backend of PyTorch holds the complete package, which is pure Python, and is loaded under a unique
name. Its ops are registered under that name, so that several versions coexist in one process, beside an installed one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

NAME = "ssm-kernels"
VERSION = 1
"""Version of the interface, incremented by a breaking change. Callers pass it to `get_kernel`."""
BACKENDS = ("cpu", "cuda", "rocm")
EXCLUDED = ("integrations",)
"""Subpackages that need the package under its own name."""

CARD = """---
library_name: kernels
license: mit
tags: [kernel, mamba, state-space-model]
---

# ssm-kernels

Selective scan (Mamba-1), SSD (Mamba-2), causal conv1d, gated RMSNorm, decoding steps and scans over grids: Triton
kernels on a GPU, PyTorch elsewhere, forward and backward.

```python
from kernels import get_kernel

ssm = get_kernel("OWNER/ssm-kernels", version={version})
y, final_states = ssm.ssd(x, dt, A, B, C, dt_softplus=True)
```

It has {ops}. Each has its contract in its docstring.
"""


def build(out: Path) -> None:
    """Write the folder that is uploaded as a kernel repository.

    Args:
        out: a new or empty folder.

    Raises:
        FileExistsError: `out` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: give a new folder")
    source = Path(__file__).parent.parent
    files = sorted(
        path.relative_to(source)
        for path in source.rglob("*.py")
        if path.relative_to(source).parts[0] not in EXCLUDED and "__pycache__" not in path.parts
    )
    # Names and contents, so that a build of other sources has another id, and the same sources have the same.
    digest = hashlib.sha256(b"".join(str(f).encode() + (source / f).read_bytes() for f in files)).hexdigest()[:10]
    # Pure Python, so that the folders differ in their metadata alone.
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        for file in files:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, target)
        with (folder / "__init__.py").open("a", encoding="utf-8") as init:
            init.write("\nfrom . import layers  # `kernels` looks them up as an attribute\n")
        metadata = {
            "name": NAME,
            "id": f"_{NAME.replace('-', '_')}_{backend}_{digest}",
            "version": VERSION,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    # Ops are functions, whose names are lower case; classes are their results and options.
    from .. import __all__ as ops

    names = ", ".join(f"`{name}`" for name in ops if name[0].islower())
    (out / "README.md").write_text(CARD.format(version=VERSION, ops=names), encoding="utf-8")


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description="Write this package in the layout of the Hub's kernels.")
    parser.add_argument("out", type=Path, help="a new folder; upload it with `hf upload` as a kernel repository")
    out = parser.parse_args().out
    build(out)
    print(f"{out}: {', '.join(f'build/torch-{b}' for b in BACKENDS)}, README.md")


if __name__ == "__main__":
    main()
