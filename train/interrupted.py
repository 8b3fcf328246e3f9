"""The end of a run that was asked to stop."""


class Interrupted(SystemExit):
    """The stage was asked to stop, has saved, and can be started again. Exit status 130, as after Ctrl-C."""
