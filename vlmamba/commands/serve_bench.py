"""`vlmamba serve-bench`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..model.fields import Count
from ..model.files import write_atomic
from ..train.programs import running_program
from .options import Positional


@dataclass
class ServeBench:
    """Load-test a server by one client, then many: requests/s, tokens/s, time to first token, p50, p99, errors.

    Examples:
    $ vlmamba serve-bench runs/demo-quick/vl-mamba/model
    $ vlmamba serve-bench http://127.0.0.1:8000 --clients 16 --no-image
    """

    target: Positional[str]
    """A running server, as http://HOST:PORT; or a model, which is then served for the test on this machine."""
    clients: Count = 64
    """Clients at once."""
    requests: Count = 512
    """Requests of all clients together; one client alone sends a quarter of them."""
    new_tokens: Count | None = None
    """Length of every answer in tokens; by default the model ends its answers."""
    image: bool = True
    """Ask about an image, another one each time. --no-image asks in text alone."""
    api_key: str | None = None
    """Key of the server. The environment variable VLMAMBA_API_KEY keeps it from the list of processes."""
    output: Path | None = None
    """JSON file for the report."""

    def run(self) -> None:
        """Print both reports, and exit with status 1 if a request failed."""
        from ..serve.bench import compare

        is_url = self.target.startswith(("http://", "https://"))
        with contextlib.nullcontext(self.target) if is_url else serving(self.target) as url:
            key = self.api_key or os.environ.get("VLMAMBA_API_KEY")
            report = asyncio.run(compare(url, key, self.clients, self.requests, self.new_tokens, self.image))
        names = report["one"]
        print(f"{'':<22}{'one client':>14}{f'{self.clients} clients':>14}")
        for name in names:
            if name != "first_error":
                print(f"{name:<22}{report['one'][name]:>14.4g}{report['many'][name]:>14.4g}")
        print(f"{'speedup':<22}{'':>14}{report['speedup']:>14.2f}")
        if self.output is not None:
            write_atomic(self.output, json.dumps(report, indent=2) + "\n")
        errors = [report[side]["first_error"] for side in ("one", "many") if report[side]["errors"]]
        if errors:
            raise ValueError(f"requests failed, the first with: {errors[0]}")


@contextlib.contextmanager
def serving(model: str) -> Iterator[str]:
    """Serve a model in another process for the duration of a block. Yield its address.

    Raises:
        ValueError: the server did not start.
    """
    command = [sys.executable, "-m", "vlmamba", "serve", model, "--port", "0"]
    with running_program(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at " not in line:
            raise ValueError(f"{model} could not be served")
        yield line.rsplit(" at ", 1)[1].strip()
