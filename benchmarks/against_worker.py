"""Time calls of the `ssm_kernels` of one checkout, in a process of its own: `against` starts it as a script.

Arguments: the checkout, a file with the calls, and the file to write. Nothing of this package is imported, since the
checkout may be of any version.
"""

from __future__ import annotations

import json
import sys
import time

SHORT = 0.02
"""Seconds that a sample takes at least: short calls are repeated in it."""
SAMPLES = 5


def main(checkout: str, calls_file: str, out_file: str) -> None:
    """Write the seconds and processor seconds of each call, by its name; an error's text in place of them."""
    sys.path[0] = checkout  # was this file's folder
    import torch

    import ssm_kernels

    if not str(ssm_kernels.__file__).startswith(checkout):
        raise SystemExit(f"{ssm_kernels.__file__} is not of {checkout}")
    torch.set_num_threads(1)
    found = {}
    for name, call in torch.load(calls_file).items():
        needed = [t for t in call["inputs"].values() if t.requires_grad]

        def run(call=call, needed=needed) -> None:
            with torch.set_grad_enabled(call["backward"]):
                op = getattr(ssm_kernels, call["op"])
                y = op(**call["inputs"], **call["options"], backend=call["backend"])
                y = y[0] if isinstance(y, tuple) else y
            if call["backward"]:
                torch.autograd.grad(y, needed, torch.ones_like(y), allow_unused=True)

        try:
            run()  # compiles
            repeats = max(1, round(SHORT / max(_sample(run, 1)[1], 1e-6)))
            found[name] = [_sample(run, repeats) for _ in range(SAMPLES)]
        except Exception as e:  # such as an op that the checkout does not have
            found[name] = f"{type(e).__name__}: {e}"
    with open(out_file, "w") as file:
        json.dump(found, file)


def _sample(run, repeats: int) -> tuple[float, float]:
    """Seconds by the clock and of the processor, a call."""
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - clock) / repeats, (time.process_time() - processor) / repeats


if __name__ == "__main__":
    main(*sys.argv[1:])
