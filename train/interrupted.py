"""The end of a run that was asked to stop."""


class Interrupted(SystemExit):
    """The stage was asked to stop, has saved, and can be started again. The exit status is that of a process which the
    signal ended: 143 after SIGTERM, 130 after Ctrl-C."""
