"""The commands that use a model: generate, chat, inspect, convert."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from ..model.generate import GenerationConfig
from ..model.prompt import TEMPLATES, get_template

if TYPE_CHECKING:
    from ..model.chat import Conversation
    from ..model.lm import MambaLM
    from ..model.vlm import VLM

Positional = tyro.conf.Positional
DtypeName = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Sampling = Annotated[GenerationConfig, tyro.conf.arg(name="")]


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


@dataclass
class Generate:
    """Answer a question about an image, or none; or those of a file, in batches. Language models go on from a text."""

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    prompt: Positional[str | None] = None
    """The question, or the text to go on from."""
    image: Path | None = None
    """What it is about. With --prompts: of each prompt that has none of its own."""
    prompts: Path | None = None
    """File of prompts, one a line; or JSONL, records with "prompt" and perhaps "image", a path relative to the file.
    Answers are printed as JSONL."""
    batch_size: int = 8
    """Prompts of a file that are answered together."""
    sampling: Sampling = GenerationConfig()
    dtype: DtypeName | None = None
    """The file's own by default."""
    device: str = "auto"
    """auto is a GPU where there is one."""

    def run(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give either a prompt or --prompts FILE")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.prompts is not None:
            self._answer_all(read_prompts(self.prompts, self.image))
            return
        model = load(self.model, self.dtype, self.device)
        for piece in stream(model, Question(self.prompt, self.image), self.sampling):
            print(piece, end="", flush=True)
        print()

    def _answer_all(self, questions: Sequence[Question]) -> None:
        model = load(self.model, self.dtype, self.device)
        with tqdm(total=len(questions), desc="generate", unit="prompt", file=sys.stderr, dynamic_ncols=True) as bar:
            for begin in range(0, len(questions), self.batch_size):
                some = questions[begin : begin + self.batch_size]
                for question, answer in zip(some, answers(model, some, self.sampling), strict=True):
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
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            questions.append(Question(line, image))
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
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


@dataclass
class Chat:
    """Talk to a model. /image PATH shows it an image, /reset begins anew, /help lists the commands, /quit ends."""

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    image: Path | None = None
    """Image to talk about from the beginning."""
    history: bool = True
    """Each question is about the conversation so far, where the model's template has turns; else it stands alone."""
    template: Literal[tuple(TEMPLATES)] | None = None  # type: ignore[valid-type]
    """Of the turns; the model's own by default. A language model without one goes on from each text by itself."""
    verbose: bool = False
    """Say after each answer how long it took, and how large the state is."""
    sampling: Sampling = GenerationConfig()
    dtype: DtypeName | None = None
    """The file's own by default."""
    device: str = "auto"
    """auto is a GPU where there is one."""

    def run(self) -> None:
        from ..model.chat import Conversation

        model = load(self.model, self.dtype, self.device)
        template = None if self.template is None else get_template(self.template)
        conversation = Conversation(model, self.image, self.sampling, template, self.history)
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
                self._obey(conversation, line)
            except KeyboardInterrupt:
                print()
            except (ValueError, OSError) as e:
                print(e)

    def _obey(self, conversation: Conversation, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/help":
            print(HELP)
        elif command == "/reset":
            conversation.reset()
        elif command == "/image":
            if not rest.strip():
                raise ValueError("/image needs the path of an image")
            conversation.reset(pasted_path(rest.strip()))
        elif command.startswith("/"):
            raise ValueError(f"no command {command}; there are /image, /reset, /help and /quit")
        elif line:
            self._answer(conversation, line)

    def _answer(self, conversation: Conversation, line: str) -> None:
        with contextlib.closing(conversation.ask(line)) as pieces:
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="")
        print()
        if self.verbose:
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


@dataclass
class Inspect:
    """Show what a checkpoint is: parameters, memory for weights and state, operations a token. Weights are not read."""

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    dtype: DtypeName | None = None
    """As if it were loaded so; the file's own by default."""
    json: bool = False
    """Print JSON; sizes are bytes, and operations are floating-point operations."""

    def run(self) -> None:
        from ..model.inspect import inspect

        report = inspect(self.model, self.dtype and DTYPES[self.dtype])
        print(json.dumps(report.to_json(), indent=2) if self.json else report)


@dataclass
class Convert:
    """Write a model in another layout: this library's; of language models, that of state-spaces (mamba_ssm) or
    transformers; of vision-language models, that of Cobra's and ML-Mamba's releases."""

    src: Positional[str]
    """Folder, or name on the Hugging Face Hub, in any layout that is known."""
    dst: Positional[Path]
    """Folder to write, new or empty."""
    to: Literal["own", "state-spaces", "transformers", "released"]
    dtype: DtypeName | None = None
    """The file's own by default."""

    def run(self) -> None:
        from ..model.convert import convert

        convert(self.src, self.dst, to=self.to, dtype=self.dtype and DTYPES[self.dtype])
        print(f"wrote {self.dst}")
