"""The commands that use a model: generate, chat, inspect, convert."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..model.device import device_named
from ..model.files import at_home
from ..model.generation_config import GenerationConfig
from ..model.image import open_image
from ..model.prompt import get_template
from .command_line import describe, printable
from .options import Chat, Convert, DtypeName, Generate, Inspect
from .prompts import answer_prompts, check_text

if TYPE_CHECKING:
    from ..model.chat import Conversation
    from ..model.lm import MambaLM
    from ..model.vlm import VLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(name: str, dtype: DtypeName | None, device: str) -> MambaLM | VLM:
    """A model that can be asked.

    Raises:
        ValueError: it cannot be, or there is no such device.
        OSError: as `from_pretrained`.
    """
    from ..model.load import load_model

    model = load_model(name, dtype=dtype and DTYPES[dtype], device_map=device_named(device))
    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so it cannot be asked in text")
    return model


def run_generate(command: Generate) -> None:
    """Answer one prompt, or those of a file. SIGTERM ends it with status 143; what is answered stays."""
    if (command.prompt is None) == (command.prompts is None):
        raise ValueError("give either a prompt or --prompts FILE")
    if command.output is not None and command.prompts is None:
        raise ValueError("--output is for the answers to --prompts")
    with ending_on_sigterm():
        if command.prompts is not None:
            answer_prompts(command, lambda: load(command.model, command.dtype, command.device))
            return
        assert command.prompt is not None
        check_text(command.prompt)
        if command.image is not None:
            open_image(command.image)
        model = load(command.model, command.dtype, command.device)
        for piece in stream(model, command.prompt, command.image, command.sampling):
            print(printable(piece), end="", flush=True)
        print()


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, with exit status 143."""

    def end(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stream(model: MambaLM | VLM, prompt: str, image: Path | None, config: GenerationConfig) -> Iterator[str]:
    """Answer one prompt piece by piece."""
    from ..model.vlm import VLM

    if isinstance(model, VLM):
        return model.stream(prompt, image, config)
    if image is not None:
        raise ValueError(f"the model is a language model, which sees no image, but was given {image}")
    return model.stream(prompt, config)


HELP = """\
/image PATH  show an image, and begin anew
/reset       begin anew, without an image
/help        this list
/quit        end (or Ctrl-D)
Ctrl-C stops an answer."""


def run_chat(command: Chat) -> None:
    """Talk until /quit or the end of the input. What goes wrong in a turn ends the turn alone."""
    from ..model.chat import Conversation

    model = load(command.model, command.dtype, command.device)
    template = None if command.template is None else get_template(command.template)
    conversation = Conversation(model, command.image, command.sampling, template, command.history)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused as a turn
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history in input()
    print("/help lists the commands", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends")
            continue
        if line == "/quit":
            return
        try:
            _obey(command, conversation, line)
        except KeyboardInterrupt:
            print()
        except BrokenPipeError:
            raise
        except (ValueError, OSError, RuntimeError, MemoryError) as e:
            print(printable(describe(e)))


def _obey(command: Chat, conversation: Conversation, line: str) -> None:
    check_text(line)
    word, _, rest = line.partition(" ")
    if word == "/help":
        print(HELP)
    elif word == "/reset":
        conversation.reset()
    elif word == "/image":
        if not rest.strip():
            raise ValueError("/image needs the path of an image")
        conversation.reset(pasted_path(rest.strip()))
    elif word.startswith("/"):
        raise ValueError(f"no command {word}; there are /image, /reset, /help and /quit")
    elif line:
        _answer(command, conversation, line)


def _answer(command: Chat, conversation: Conversation, line: str) -> None:
    begun = False
    with contextlib.closing(conversation.ask(line)) as pieces:
        try:
            for piece in pieces:
                begun = True
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except Exception:
            if begun:
                print()
            raise
    print()
    if command.verbose:
        from ..model.inspect import mebibytes

        effort = conversation.effort
        print(
            f"[{effort.prompt_tokens} tokens read in {effort.prompt_seconds:.2f} s; {effort.tokens} written, "
            f"{effort.tokens_per_second:.1f} a second; state {mebibytes(conversation.state_bytes)}]",
            file=sys.stderr,
        )


def pasted_path(text: str) -> Path:
    """A path as it is typed, or as a terminal pastes it: in quotes, or with backslashes before its spaces.

    Raises:
        ValueError: it begins with the home folder of a user who is not there.
    """
    path = at_home(text)
    if not path.exists():
        with contextlib.suppress(ValueError):  # of a quote that is not closed
            words = shlex.split(text)
            if len(words) == 1:
                return at_home(words[0])
    return path


def run_inspect(command: Inspect) -> None:
    """Print what a checkpoint is."""
    from ..model.inspect import inspect

    report = inspect(command.model, command.dtype and DTYPES[command.dtype])
    print(json.dumps(report.to_json(), indent=2) if command.json else report)


def run_convert(command: Convert) -> None:
    """Write a model in another layout."""
    from ..model.convert import convert

    convert(command.src, command.dst, to=command.to, dtype=command.dtype and DTYPES[command.dtype])
    print(f"wrote {command.dst}")
