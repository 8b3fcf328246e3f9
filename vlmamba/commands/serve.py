"""`vlmamba serve`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..model.extras import install_command
from ..model.fields import Interval
from ..model.prompt import TEMPLATES, get_template
from ..serve.config import ServeConfig
from .options import Group, Loading, Positional


@dataclass
class Serve:
    """Serve a model to many clients at once: OpenAI's HTTP interface, and a page to ask about an image.

    Examples:
    $ vlmamba serve runs/demo-quick/vl-mamba/model
    $ vlmamba serve runs/mine/model --host 0.0.0.0 --api-keys keys.txt --slots 16
    """

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 is every network of the machine: give --api-keys then."""
    port: Annotated[int, Interval("[0, 65535]")] = 8000
    """Port to listen at; 0 takes a free one."""
    name: str | None = None
    """Name of the model for clients; by default the last part of its path or Hub name."""
    api_keys: Path | None = None
    """File of the keys that are accepted, one a line, as Authorization: Bearer KEY. Each has states of its own."""
    template: Literal[tuple(TEMPLATES)] | None = None  # type: ignore[valid-type]
    """Prompt template of a language model's conversations; a VLM has its own."""
    drain_seconds: Annotated[float, Interval("[0, inf)")] = 30.0
    """Longest time for running answers to end after SIGTERM or Ctrl-C."""
    limits: Group[ServeConfig] = ServeConfig()
    loading: Group[Loading] = Loading()

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C; answers that run then are finished."""
        try:
            import fastapi  # noqa: F401
            import prometheus_client  # noqa: F401
            import uvicorn  # noqa: F401
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError(f"{e}; `vlmamba serve` needs it: {install_command('serve')}") from e
        from ..model.vlm import VLM
        from ..serve.app import Service
        from ..serve.server import Server
        from .loading import load_with_tokenizer

        keys = [] if self.api_keys is None else read_keys(self.api_keys)
        model = load_with_tokenizer(self.model, self.loading)
        if isinstance(model, VLM) and self.template is not None:
            raise ValueError("--template is for language models; a VLM has its own")
        if not keys and self.host not in ("127.0.0.1", "::1", "localhost"):
            logging.getLogger(__name__).warning("%s is not this machine alone, and no --api-keys are set", self.host)
        name = self.name or Path(self.model).resolve().name
        template = None if self.template is None else get_template(self.template)
        service = Service(model, name, self.limits, keys, template)
        server = Server(service, self.host, self.port, self.drain_seconds)
        server.run()
        if not server.started:
            raise OSError(f"cannot listen at {self.host}:{self.port}")


def read_keys(path: Path) -> list[str]:
    """Read a file of API keys, one a line; lines that are empty or start with # are left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no key.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{path} has no key")
    return keys
