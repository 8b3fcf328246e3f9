"""The drop-in's part of the import system: a finder on `sys.meta_path`, and modules with lazy names."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .originals import Original, Refused

PACKAGE = __name__.rpartition(".")[0]


class Finder(MetaPathFinder):
    """Finds the modules of originals, and their versions for `importlib.metadata`."""

    def __init__(self, originals: dict[str, Original]):
        self.originals = originals

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module of an original, or None for other modules.

        Raises:
            ModuleNotFoundError: an original's module that is not provided; the message lists those that are.
        """
        original = self._original_of(fullname)
        if original is None:
            return None
        names = names_of(original, fullname)
        if names is not None:
            # Every module is a package, so that `from module import name` looks up a missing name here.
            return ModuleSpec(fullname, ModuleLoader(original, names), origin=PACKAGE, is_package=True)
        if "." not in fullname:
            return None
        raise ModuleNotFoundError(missing(original, fullname), name=f"{fullname} (of {PACKAGE})")

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        """Yield the metadata of the originals: name, version and provider."""
        # A context without a name asks for all distributions.
        wanted = None if context is None or context.name is None else normalized(context.name)
        for name, original in self.originals.items():
            if wanted in (None, normalized(name)):
                yield Distribution(name, original)

    def _original_of(self, fullname: str) -> Original | None:
        top = fullname.split(".")[0]
        for original in self.originals.values():
            if top in original.import_names:
                return original
        return None


class ModuleLoader(Loader):
    """Creates modules whose names are imported on first access."""

    def __init__(self, original: Original, names: dict[str, str | Refused]):
        self.original, self.names = original, names

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return None, for an ordinary module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Set the module's version, docstring and lookup."""
        fullname, original, names = module.__name__, self.original, self.names
        module.__doc__ = f"{fullname}, provided by {PACKAGE}."
        submodules = set(submodules_of(original, fullname))
        provided = sorted(name for name, target in names.items() if not isinstance(target, Refused))

        def look_up(name: str) -> Any:
            target = names.get(name)
            if name in submodules:
                value = importlib.import_module(f"{fullname}.{name}")
            elif target is None or isinstance(target, Refused):
                raise AttributeError(missing(original, f"{fullname}.{name}"), name=name, obj=module)
            else:
                value = resolve(target, f"{fullname}.{name}")
            # From now on `__getattr__` is not called for this name (PEP 562).
            setattr(module, name, value)
            return value

        def listed() -> list[str]:
            return sorted({*vars(module), *provided, *submodules})

        vars(module).update(__all__=provided, __getattr__=look_up, __dir__=listed)
        if "." not in fullname:
            vars(module)["__version__"] = original.version


class Distribution(importlib.metadata.Distribution):
    """Metadata of a provided release."""

    def __init__(self, name: str, original: Original):
        self._name, self._original = name, original

    def read_text(self, filename: str) -> str | None:
        """Return METADATA or top_level.txt; None for other files."""
        if filename == "METADATA":
            summary = f"Summary: provided by {PACKAGE}; the original is not installed"
            return f"Metadata-Version: 2.1\nName: {self._name}\nVersion: {self._original.version}\n{summary}\n"
        if filename == "top_level.txt":
            return "\n".join(self._original.import_names) + "\n"
        return None

    def locate_file(self, path: Any) -> Any:
        """Refuse, since no file is installed.

        Raises:
            FileNotFoundError: always.
        """
        raise FileNotFoundError(f"{self._name} is provided by {PACKAGE}: {path} is not installed")


def names_of(original: Original, fullname: str) -> dict[str, str | Refused] | None:
    """Return the names of a module, none for a package that only holds others; None for an unknown module."""
    if fullname in original.modules:
        return original.modules[fullname]
    return {} if any(True for _ in submodules_of(original, fullname)) else None


def submodules_of(original: Original, fullname: str) -> Iterator[str]:
    """Yield the names of the modules directly inside a package."""
    prefix = fullname + "."
    # A dict drops repetitions and keeps the order of the table, as a set would not.
    yield from dict.fromkeys(m.removeprefix(prefix).split(".")[0] for m in original.modules if m.startswith(prefix))


def missing(original: Original, fullname: str) -> str:
    """Return the message for a missing module or name: the reason, and what its parent has."""
    parent, _, name = fullname.rpartition(".")
    target = (names_of(original, parent) or {}).get(name)
    reason = target.reason if isinstance(target, Refused) else None
    for refused, why in original.refused.items():
        if fullname == refused or fullname.startswith(refused + "."):
            reason = why
    names = [n for n, t in (names_of(original, parent) or {}).items() if not isinstance(t, Refused)]
    have = ", ".join(sorted({*names, *submodules_of(original, parent)}))
    because = f": {reason}" if reason else ""
    return f"{fullname} is not provided by {PACKAGE}{because}. {parent} has: {have}"


def resolve(target: str, asked: str) -> Any:
    """Import the object that a name refers to.

    Args:
        target: `module:name`.
        asked: full name under which it was looked up, for the message.

    Raises:
        ImportError: it is in a package that is not installed, or too old; the message names it.
    """
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name, PACKAGE)
        return getattr(module, name)
    except (ImportError, AttributeError) as error:
        where = module_name if not module_name.startswith(".") else PACKAGE + module_name
        raise ImportError(f"{asked} is {where}.{name}, which cannot be imported: {error}", name=asked) from error


def normalized(name: str) -> str:
    """Normalize the name of a distribution as in PEP 503."""
    return name.replace("-", "_").replace(".", "_").lower()


def forget(originals: dict[str, Original]) -> None:
    """Remove the originals' modules that were created here from `sys.modules`."""
    # A copy, since entries are deleted on the way.
    for name, module in list(sys.modules.items()):
        loader = getattr(getattr(module, "__spec__", None), "loader", None)
        if isinstance(loader, ModuleLoader) and loader.original in originals.values():
            del sys.modules[name]
