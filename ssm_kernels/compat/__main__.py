"""Run an unmodified program with the originals' names provided by this package.

    python -m ssm_kernels.compat [--shadow] script.py args…
    python -m ssm_kernels.compat [--shadow] -m module args…

The program sees its own `sys.argv`, `sys.path[0]` and `__main__`; its exit status is that of the command, and a
traceback starts in it. One line on stderr lists what is provided. Processes that it forks have the names too; new
processes have to be started by this command themselves (`torchrun -m ssm_kernels.compat script.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import runpy
import sys
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType, TracebackType
from typing import NoReturn

from . import install

HIDDEN = (__file__, runpy.__file__)
"""Files whose frames are left out of a traceback."""


def main(argv: list[str]) -> None:
    """Parse the command, install, and run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m ssm_kernels.compat", description="Run a program under the originals' names."
    )
    parser.add_argument("--shadow", action="store_true", help="provide originals that are installed as well")
    parser.add_argument("-m", dest="is_module", action="store_true", help="the program is a module")
    parser.add_argument("program", help="script, or module with -m")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the program")
    options = parser.parse_args(argv)

    # stdout is the program's.
    print(install(shadow=options.shadow), file=sys.stderr)
    sys.excepthook = show_traceback_of_program
    # A new module, so that the program's globals do not start with the names above.
    main_module = ModuleType("__main__")
    if options.is_module:
        _set_first_path(os.getcwd())
        spec, code = code_of_module(options.program)
        main_module.__file__, main_module.__package__ = spec.origin, spec.parent
        main_module.__spec__, main_module.__loader__ = spec, spec.loader
    else:
        _set_first_path(os.path.dirname(os.path.abspath(options.program)))
        code = code_of_script(options.program)
        main_module.__file__ = options.program
    sys.argv = [main_module.__file__, *options.args]
    # `pickle` and `multiprocessing` look for the program's classes here.
    sys.modules["__main__"] = main_module
    exec(code, main_module.__dict__)


def _set_first_path(folder: str) -> None:
    """Put the program's folder where Python would; with `-P` or `PYTHONSAFEPATH` it puts none there."""
    if not getattr(sys.flags, "safe_path", False):  # since Python 3.11
        sys.path[0] = folder


def code_of_script(path: str) -> CodeType:
    """Compile a file, in the encoding that it declares."""
    try:
        with io.open_code(os.path.abspath(path)) as file:
            return compile(file.read(), path, "exec")
    except OSError as error:
        stop(f"cannot open {path}: {error.strerror}")


def code_of_module(name: str) -> tuple[ModuleSpec, CodeType]:
    """Find a module, or a package's `__main__`."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        stop(str(error))
    if spec is None or not isinstance(spec.loader, InspectLoader):
        stop(f"no module named {name} that can be run")
    code = spec.loader.get_code(spec.name)
    if code is None:
        stop(f"module {name} has no Python code")
    return spec, code


def stop(message: str) -> NoReturn:
    """End with status 2, as Python itself does for a program that it cannot find."""
    print(f"python -m ssm_kernels.compat: {message}", file=sys.stderr)
    raise SystemExit(2)


def show_traceback_of_program(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Leave out the frames before the program's first."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (*HIDDEN, "<frozen runpy>"):
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


if __name__ == "__main__":
    main(sys.argv[1:])
