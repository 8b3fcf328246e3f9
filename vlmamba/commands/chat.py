"""`vlmamba chat`."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ..command_line import describe, printable
from ..help import Without
from ..interrupts import after_imports
from ..model.files import expand_home
from ..model.generation.config import GenerationConfig
from ..model.prompt import TEMPLATES, get_template
from ..train.signals import handling
from .options import Group, Loading, Positional, Sampling
from .streaming import hold_first

if TYPE_CHECKING:
    from PIL import Image

    from ..model.chat import Conversation

HELP = """\
/image PATH  show an image with the next question
/video PATH  show a video: a folder of frames, or an animated file
/reset       start over without images
/help        this list
/quit        quit (or Ctrl-D)
Ctrl-C stops an answer; Tab completes a path."""
QUIT = ("/quit", "quit", "exit")
COMMANDS = ("/image ", "/video ", "/reset", "/help", "/quit")


@dataclass
class Chat:
    """Chat with a model. /image PATH shows it an image, /reset starts over, /help lists the commands, /quit quits.

    Examples:
    $ vlmamba chat runs/demo-quick/vl-mamba/model --image picture.png
    $ vlmamba chat han1997/cobra --image picture.png --dtype bf16 --temperature 0.7
    """

    model: Positional[str]
    """Folder, or name on the Hugging Face Hub."""
    image: tuple[Path, ...] = ()
    """Images that the conversation starts with."""
    history: bool = True
    """Keep the conversation so far as context, where the model's template has turns; else each question is alone."""
    template: Literal[tuple(TEMPLATES)] | None = None  # type: ignore[valid-type]
    """Prompt template; the model's own by default. A language model without one continues each text by itself."""
    verbose: bool = False
    """Print the time of each answer and the size of the state."""
    sampling: Annotated[Sampling, Without(("draft_tokens",))] = GenerationConfig()
    loading: Group[Loading] = Loading()

    def run(self) -> None:
        """Read and answer turns until /quit or the end of the input. An error in a turn ends that turn alone."""
        from ..model.chat import Conversation
        from ..model.image import open_image
        from .loading import load_with_tokenizer

        model = load_with_tokenizer(self.model, self.loading)
        template = None if self.template is None else get_template(self.template)
        images = [open_image(path) for path in self.image]
        conversation = Conversation(model, images, self.sampling, template, self.history)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is an error of its turn
        enable_completion()
        seen = describe_images(conversation, list(zip(self.image, images, strict=True)))
        note(" · ".join([describe_model(self.model, conversation), *seen, "/help lists the commands"]))
        # Piped questions get the answers alone.
        prompt = "> " if sys.stdin.isatty() else ""
        with handling((signal.SIGINT,), after_imports):
            while self._take_turn(conversation, prompt):
                pass

    def _take_turn(self, conversation: Conversation, prompt: str) -> bool:
        """Read and answer a turn. Return whether another one follows."""
        try:
            line = input(prompt).strip()
        except EOFError:
            print()
            return False
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D quits")
            return True
        if line in QUIT:
            return False
        # Everything but a closed pipe ends the turn alone.
        try:
            self._run_line(conversation, line)
        except KeyboardInterrupt:
            print()
        except BrokenPipeError:
            raise
        except (ValueError, OSError, RuntimeError, MemoryError) as e:
            print(printable(describe(e)))
        return True

    def _run_line(self, conversation: Conversation, line: str) -> None:
        from ..model.image import open_image
        from ..model.video import Video
        from .prompt_file import check_text

        check_text(line)
        word, _, rest = line.partition(" ")
        if word == "/help":
            print(HELP)
        elif word == "/reset":
            conversation.reset()
            note("; ".join(["started over", *describe_images(conversation, [])]))
        elif word == "/image":
            if not rest.strip():
                raise ValueError("/image needs the path of an image")
            path = pasted_path(rest.strip())
            image = open_image(path)
            conversation.add(image)
            note(f"with the next question: {describe_images(conversation, [(path, image)])[0]}")
        elif word == "/video":
            if not rest.strip():
                raise ValueError("/video needs the path of a folder of frames or of an animated file")
            path = pasted_path(rest.strip())
            conversation.add(Video(path))
            note(f"with the next question: video: {path.name} ({conversation.images[-1].n_views} frames)")
        elif word.startswith("/"):
            raise ValueError(f"no command {word}; there are /image, /video, /reset, /help and /quit")
        elif line:
            self._answer(conversation, line)

    def _answer(self, conversation: Conversation, line: str) -> None:
        started = False
        with contextlib.closing(conversation.ask(line)) as texts:
            try:
                for text in hold_first(texts):
                    started = True
                    print(printable(text), end="", flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="")
            except Exception:
                if started:
                    print()
                raise
        print()
        # On stderr, so that piped output has the answers alone.
        if self.verbose:
            from ..model.inspect import mebibytes

            stats = conversation.turn_stats
            print(
                f"[{stats.prompt_tokens} prompt tokens in {stats.prompt_seconds:.2f} s; {stats.tokens} generated, "
                f"{stats.tokens_per_second:.1f} tokens/s; state {mebibytes(conversation.state_bytes)}]",
                file=sys.stderr,
            )


def note(text: str) -> None:
    """Tell the user something that is no answer: on stderr, so that piped output has the answers alone."""
    print(printable(text), file=sys.stderr)


def describe_model(name: str, conversation: Conversation) -> str:
    """Name, size, dtype and device of the model, in one line."""
    weights = list(conversation.model.parameters())
    dtype = str(weights[0].dtype).removeprefix("torch.")
    return " · ".join([name, f"{sum(p.numel() for p in weights):,} parameters", dtype, str(conversation.lm.device)])


def describe_images(conversation: Conversation, images: list[tuple[Path, Image.Image]]) -> list[str]:
    """Images that are shown, by name and size; nothing for a language model, which sees none."""
    from ..model.vlm import VLM

    if not isinstance(conversation.model, VLM):
        return []
    return [f"image: {path.name} ({image.width} x {image.height})" for path, image in images] or ["no image"]


def enable_completion() -> None:
    """Edit lines with history, and complete commands and paths by Tab, where Python has readline."""
    try:
        import readline
    except ImportError:
        return
    readline.set_completer_delims("")  # a path may have spaces
    readline.set_completer(lambda text, n: dict(enumerate(completions(text))).get(n))
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def completions(line: str) -> list[str]:
    """Complete a line that begins with `/`: the commands, or after `/image ` and `/video ` the paths."""
    command = line[: len("/image ")]
    if command not in ("/image ", "/video "):
        return [command for command in COMMANDS if command.startswith(line) and line]
    start = line.removeprefix(command)
    folder, base = os.path.split(start)
    with contextlib.suppress(OSError, ValueError):  # no such folder, or none that may be read
        root = expand_home(folder or ".")
        names = sorted(name for name in os.listdir(root) if name.startswith(base))
        return [f"{command}{os.path.join(folder, name)}{os.sep if (root / name).is_dir() else ''}" for name in names]
    return []


def pasted_path(text: str) -> Path:
    """A path as it is typed, or as a terminal pastes it: in quotes, or with backslashes before its spaces.

    Raises:
        ValueError: it names the home folder of an unknown user.
    """
    path = expand_home(text)
    if not path.exists():
        with contextlib.suppress(ValueError):  # an unclosed quote
            words = shlex.split(text)
            if len(words) == 1:
                return expand_home(words[0])
    return path
