"""Other packages' names and signatures on the ops of this one.

`ssm_kernels.compat.mamba_ssm` and `ssm_kernels.compat.vmamba` are imported in place of the originals. Code that is not
to be changed finds the originals' own names after

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
    """What `install` did, by distribution."""

    answered: tuple[str, ...]
    """Those whose modules come from this package now."""
    left: dict[str, str]
    """Those that are installed themselves, and where: they are left alone."""

    def __str__(self) -> str:
        parts = [
            f"{name} {ORIGINALS[name].version} ({', '.join(ORIGINALS[name].import_names)}) is answered by {__name__}"
            for name in self.answered
        ]
        parts += [f"{name} is left alone: it is installed in {where}" for name, where in self.left.items()]
        return "; ".join(parts)


def install(*, shadow: bool = False) -> Installed:
    """Answer `import mamba_ssm`, `import causal_conv1d`, `import selective_scan_cuda` and VMamba's extensions.

    Modules are found by `import` and `importlib.util.find_spec`, versions by `importlib.metadata`. A name is imported
    when it is first asked for. A distribution that is installed itself is left alone with all its names, one that is
    installed later comes first too; calling again looks anew.

    Args:
        shadow: answer those that are installed as well. Modules of theirs that are imported already stay as they are
            where they were bound, and are replaced for later imports.

    Returns:
        What was done. It is logged too, as a warning where an original is left alone or shadowed.
    """
    uninstall()
    there = {name: where for name in ORIGINALS if (where := _installed_in(name)) is not None}
    left = {} if shadow else there
    originals = {name: original for name, original in ORIGINALS.items() if name not in left}
    if shadow:
        tops = {top for name in there for top in ORIGINALS[name].import_names}
        for name in [m for m in sys.modules if m.split(".")[0] in tops]:
            del sys.modules[name]
    finder = Finder(originals)
    _finders.append(finder)
    sys.meta_path.insert(0 if shadow else len(sys.meta_path), finder)
    importlib.invalidate_caches()
    done = Installed(tuple(originals), left)
    logger.log(logging.WARNING if there else logging.INFO, "%s%s", done, "; originals are shadowed" if shadow else "")
    return done


def uninstall() -> None:
    """Undo `install`: the originals' names are no longer answered. What was imported stays where it was bound."""
    while _finders:
        finder = _finders.pop()
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        forget(finder.originals)


def _installed_in(distribution: str) -> str | None:
    """Where one of the import names of a distribution is found, if it is."""
    for name in ORIGINALS[distribution].import_names:
        module = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if module is None else getattr(module, "__spec__", None)
        if module is not None or spec is not None:
            places = getattr(spec, "submodule_search_locations", None) or [getattr(module, "__file__", None) or name]
            return getattr(spec, "origin", None) or next(iter(places))
    return None
