"""Errors of a run's data. The model is as it was, so a loop can save a checkpoint and then let them pass."""

from __future__ import annotations


class DataError(Exception):
    """The data cannot be trained on any further: what all errors of this module are."""


class BrokenDataError(DataError, ValueError):
    """More records or samples are broken than the stage allows."""


class ChangedDataError(DataError, ValueError):
    """A file of data is not the one that was indexed when the run started."""


class WorkerDiedError(DataError, ChildProcessError):
    """A process that prepares data ended before its work was done."""
