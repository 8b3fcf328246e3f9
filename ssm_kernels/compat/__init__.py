"""Names and signatures of other packages on the ops of this one.

`ssm_kernels.compat.mamba_ssm` and `ssm_kernels.compat.vmamba` are imported instead of the originals. Unmodified code
finds the originals' own names after ::

    import ssm_kernels.compat

    ssm_kernels.compat.install()

or runs under `python -m ssm_kernels.compat script.py args…` (`-m module args…`).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from dataclasses import dataclass

from .finder import Finder, forget
from .originals import ORIGINALS

__all__ = ["Installed", "install", "uninstall"]

logger = logging.getLogger("ssm_kernels")
_finders: list[Finder] = []


@dataclass(frozen=True)
class Installed:
    """Result of `install`, by distribution."""

    provided: tuple[str, ...]
    """Distributions whose modules come from this package now."""
    skipped: dict[str, str]
    """Distributions that are installed themselves, and their locations."""

    def __str__(self) -> str:
        parts = [
            f"{name} {ORIGINALS[name].version} ({', '.join(ORIGINALS[name].import_names)}) is provided by {__name__}"
            for name in self.provided
        ]
        parts += [f"{name} is skipped: it is installed in {where}" for name, where in self.skipped.items()]
        return "; ".join(parts)


def install(*, shadow: bool = False) -> Installed:
    """Provide `import mamba_ssm`, `import causal_conv1d`, `import selective_scan_cuda` and VMamba's extensions.

    Modules are found by `import` and `importlib.util.find_spec`, versions by `importlib.metadata`. A name is imported
    on first access. A distribution that is installed itself is skipped with all its names; one that is installed later
    takes precedence too. A second call checks again.

    Args:
        shadow: provide those that are installed as well. Modules of theirs that are already imported stay where they
            are bound, and are replaced for later imports.

    Returns:
        the distributions that are provided and skipped. It is logged too, as a warning where an original is skipped or
        shadowed.
    """
    # The finders of an earlier call would answer for the originals that are looked up below.
    uninstall()
    found = {name: where for name in ORIGINALS if (where := _installed_in(name)) is not None}
    skipped = {} if shadow else found
    originals = {name: original for name, original in ORIGINALS.items() if name not in skipped}
    if shadow:
        # An import returns what `sys.modules` has, before any finder is asked.
        tops = {top for name in found for top in ORIGINALS[name].import_names}
        for name in [m for m in sys.modules if m.split(".")[0] in tops]:
            del sys.modules[name]
    finder = Finder(originals)
    _finders.append(finder)
    # In front of Python's own finders it takes precedence over installed originals; behind them, they do over it.
    sys.meta_path.insert(0 if shadow else len(sys.meta_path), finder)
    importlib.invalidate_caches()
    done = Installed(tuple(originals), skipped)
    logger.log(logging.WARNING if found else logging.INFO, "%s%s", done, "; originals are shadowed" if shadow else "")
    return done


def uninstall() -> None:
    """Undo `install`: the originals' names are no longer provided. Imported objects stay where they are bound."""
    while _finders:
        finder = _finders.pop()
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        forget(finder.originals)


def _installed_in(distribution: str) -> str | None:
    """Return the location of one of the import names of a distribution, or None."""
    for name in ORIGINALS[distribution].import_names:
        module = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if module is None else getattr(module, "__spec__", None)
        if module is not None or spec is not None:
            # A namespace package has locations and no origin; a module that a program made itself may have no spec.
            places = getattr(spec, "submodule_search_locations", None) or [getattr(module, "__file__", None) or name]
            return getattr(spec, "origin", None) or next(iter(places))
    return None
