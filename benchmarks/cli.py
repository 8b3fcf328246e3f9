"""The `ssm-bench` command."""

from __future__ import annotations

from vlmamba.interrupts import ending_by_signals

TIMING = ("run", "sweep", "integration", "gpu-suite", "against", "prefill", "decode", "draft")
"""Commands that time PyTorch's operations. Threads that sleep between them need some 30 us to wake for each, which
users of PyTorch do not see."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error in its input is one line on stderr and exit status 1."""
    with ending_by_signals("ssm-bench", is_process=arguments is None):
        from vlmamba.command_line import run_commands

        from .options import COMMANDS

        run_commands(
            "ssm-bench",
            "Measure the kernels of ssm_kernels beside their peers. Start with: ssm-bench run selective_scan",
            COMMANDS,
            arguments,
            timing=TIMING,
        )


if __name__ == "__main__":
    main()
