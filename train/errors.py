"""Exceptions that callers tell apart. They import no torch."""

from __future__ import annotations

import pickle


class Interrupted(SystemExit):
    """A signal stopped the stage, which has saved a checkpoint and can be resumed.

    The exit status is that of a process which the signal ended: 143 after SIGTERM, 130 after Ctrl-C.
    """


class Terminated(SystemExit):
    """SIGTERM came; raised so that files are closed and processes end. The exit status is 143."""


# Raised between steps, by the loader or while samples are read.


class DataError(Exception):
    """Base class of errors in a run's data. The model is unchanged, so the loop saves a checkpoint before it raises."""


class BrokenDataError(DataError, ValueError):
    """More records or samples are broken than the stage allows."""


class ChangedDataError(DataError, ValueError):
    """A data file is not the one that was indexed when the run started."""


class WorkerDiedError(DataError, ChildProcessError):
    """A process that prepares data ended before its work was done."""


def picklable(error: BaseException) -> BaseException:
    """Return an error that another process can load, with the same text."""
    # An exception whose __init__ takes other arguments fails only when it is loaded.
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
