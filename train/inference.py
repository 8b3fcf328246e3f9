"""The commands that use a model: generate, chat, inspect, convert."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..model.generation_config import GenerationConfig
from ..model.prompt import get_template
from ..model.text_files import parse_json, read_lines
from .options import Chat, Convert, DtypeName, Generate, Inspect

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

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here")
    model = load_model(name, dtype=dtype and DTYPES[dtype], device_map=device)
    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so it cannot be asked in text")
    return model


@dataclass(frozen=True)
class Question:
    """A prompt, and the image that it is about."""

    prompt: str
    image: Path | None = None


def run_generate(command: Generate) -> None:
    """Answer one prompt, or those of a file."""
    if (command.prompt is None) == (command.prompts is None):
        raise ValueError("give either a prompt or --prompts FILE")
    if command.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {command.batch_size}")
    if command.prompts is not None:
        _answer_all(command, read_prompts(command.prompts, command.image))
        return
    model = load(command.model, command.dtype, command.device)
    for piece in stream(model, Question(command.prompt, command.image), command.sampling):
        print(piece, end="", flush=True)
    print()


def _answer_all(command: Generate, questions: Sequence[Question]) -> None:
    model = load(command.model, command.dtype, command.device)
    with tqdm(total=len(questions), desc="generate", unit="prompt", file=sys.stderr, dynamic_ncols=True) as bar:
        for begin in range(0, len(questions), command.batch_size):
            some = questions[begin : begin + command.batch_size]
            for question, answer in zip(some, answers(model, some, command.sampling), strict=True):
                record = {"prompt": question.prompt, "answer": answer}
                if question.image is not None:
                    record["image"] = str(question.image)
                print(json.dumps(record, ensure_ascii=False), flush=True)
            bar.update(len(some))


def answers(model: MambaLM | VLM, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
    """Answer questions together."""
    from ..model.vlm import VLM

    if isinstance(model, VLM):
        return model.generate([q.prompt for q in questions], [q.image for q in questions], config)
    for question in questions:
        _check_no_image(question.image)
    return model.generate([q.prompt for q in questions], config)


def stream(model: MambaLM | VLM, question: Question, config: GenerationConfig):
    """Answer one question piece by piece."""
    from ..model.vlm import VLM

    if isinstance(model, VLM):
        return model.stream(question.prompt, question.image, config)
    _check_no_image(question.image)
    return model.stream(question.prompt, config)


def _check_no_image(image: Path | None) -> None:
    if image is not None:
        raise ValueError(f"the model is a language model, which sees no image, but was given {image}")


def read_prompts(path: Path, image: Path | None = None) -> list[Question]:
    """The questions of a file: one a line, or a record a line where it is JSONL. Empty lines are left out.

    Args:
        image: of each question that has none of its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a record is malformed, by its line; or there is no question.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no prompts at {path}")
    questions = []
    for i, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            questions.append(Question(line, image))
            continue
        try:
            record = parse_json(line)
        except ValueError as e:
            raise ValueError(f"{path}:{i}: not JSON: {e}") from e
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f'{path}:{i}: expected a record with a text "prompt", got {line.strip()[:80]}')
        own = record.get("image")
        if own is not None:
            if not isinstance(own, str) or not (path.parent / own).is_file():
                raise ValueError(f'{path}:{i}: "image" must be the path of a file, got {own!r}')
            own = path.parent / own
        questions.append(Question(record["prompt"], own or image))
    if not questions:
        raise ValueError(f"{path} has no prompts")
    return questions


HELP = """\
/image PATH  show an image, and begin anew
/reset       begin anew, without an image
/help        this list
/quit        end (or Ctrl-D)
Ctrl-C stops an answer."""


def run_chat(command: Chat) -> None:
    """Talk until /quit or the end of the input."""
    from ..model.chat import Conversation

    model = load(command.model, command.dtype, command.device)
    template = None if command.template is None else get_template(command.template)
    conversation = Conversation(model, command.image, command.sampling, template, command.history)
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
        except (ValueError, OSError) as e:
            print(e)


def _obey(command: Chat, conversation: Conversation, line: str) -> None:
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
    with contextlib.closing(conversation.ask(line)) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
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
    """A path as it is typed, or as a terminal pastes it: in quotes, or with backslashes before its spaces."""
    path = Path(text).expanduser()
    if not path.exists():
        with contextlib.suppress(ValueError):  # of a quote that is not closed
            words = shlex.split(text)
            if len(words) == 1:
                return Path(words[0]).expanduser()
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
