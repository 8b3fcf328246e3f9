"""`vlmamba generate --prompts`: a file of prompts, and a file of answers that the same command resumes.

A prompt that cannot be answered gets a record with an error in place of the answer; the others are answered.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from ..command_line import describe
from ..model.config_io import to_json_dict
from ..model.files import json_lines, write_atomic
from ..model.generation.config import GenerationConfig
from ..model.hub import fetch_model
from ..model.image import open_image
from ..model.prompt import Turn, mark_images
from ..model.text_files import decode, parse_json, read_json
from ..train.identity import fingerprint

if TYPE_CHECKING:
    from ..model.lm import MambaLM
    from ..model.vlm import VLM
    from .generate import Generate

MAX_CHARACTERS = 2**20
"""Longest prompt or turn: about 250,000 tokens of English. The tokenizer takes a text at once, and a kilobyte of memory
for each of its tokens."""
SETTINGS = ".settings.json"
"""Suffix of the file beside the answers that holds the settings they were made with."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and its images."""

    text: str
    images: tuple[Path, ...] = ()
    error: str | None = None
    """Why it cannot be answered; None where it can."""


def check_text(text: str) -> None:
    """Check a text before it is tokenized.

    Raises:
        ValueError: it has more than `MAX_CHARACTERS`, or half of a surrogate pair, which is not a character.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the text must have at most {MAX_CHARACTERS:,} characters, got {len(text):,}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"the text is not UTF-8: it has {text[e.start]!a} after {e.start} characters") from e


def read_prompts(path: Path, images: tuple[Path, ...] = ()) -> list[Prompt]:
    """Read the prompts of a file: one a line, or in JSONL one record a line. Empty lines are skipped.

    Lines end at a line feed alone. Every image is opened, so that a broken one is reported before a model is loaded.

    Args:
        path: text file, or records with "prompt" and perhaps "image", a path or a list of them, where it ends in
            `.jsonl`.
        images: images of each prompt that names none.

    Returns:
        The prompts. One that is malformed, or whose image cannot be read, has an error that names its line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: there is no prompt, or the file is UTF-16.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no prompts at {path}")
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8")
    prompts = []
    opened: dict[Path, str | None] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        line = line.removesuffix(b"\r")  # a file from Windows
        if not line.strip():
            continue
        shown = line[:80].decode(errors="replace")
        try:
            prompt = _parse(decode(line), path, images)
            shown = prompt.text[:80]
            check_text(prompt.text)
            if prompt.images:
                mark_images([Turn("user", prompt.text)], len(prompt.images))
        except ValueError as e:
            prompts.append(Prompt(shown, (), f"{path}:{number}: {e}"))
            continue
        for image in prompt.images:
            # Many prompts may share an image, which is opened once.
            if image not in opened:
                opened[image] = _why_unreadable(image)
            if why := opened[image]:
                prompt = replace(prompt, error=f"{path}:{number}: {why}")
                break
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts


def _parse(line: str, path: Path, images: tuple[Path, ...]) -> Prompt:
    if path.suffix != ".jsonl":
        return Prompt(line, images)
    record = parse_json(line)
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f'expected a record with a text "prompt", got {line.strip()[:80]}')
    own = record.get("image")
    if own is None:
        return Prompt(record["prompt"], images)
    names = own if isinstance(own, list) else [own]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f'"image" must be the path of a file or a list of paths, got {own!r}')
    return Prompt(record["prompt"], tuple(path.parent / name for name in names))


def _why_unreadable(image: Path) -> str | None:
    try:
        open_image(image)
    except (ValueError, OSError) as e:
        return str(e)
    return None


def answer_prompts(command: Generate, load: Callable[[], MambaLM | VLM]) -> None:
    """Answer the prompts of a file in batches, and write the records of each batch as soon as it is answered.

    Args:
        command: `prompts` names the file. `output` names the file of answers, which is resumed where it has some;
            without it they are printed.
        load: returns the model; called after the prompts are read.

    Raises:
        ValueError, OSError: as `read_prompts` and `load`; or `output` was made with other prompts or settings.
        SystemExit: a prompt has an error in place of an answer; raised at the end, with status 1.
    """
    assert command.prompts is not None
    prompts = read_prompts(command.prompts, command.image)
    done, failed = (0, 0) if command.output is None else _truncate_output(command.output, _settings(command), prompts)
    if done == len(prompts):
        print(f"all {done} prompts are answered in {command.output}", file=sys.stderr)
    else:
        # Every prompt is known to be readable by now: a typo costs no minutes of loading.
        model = load()
        with (
            _open_output(command.output) as out,
            tqdm(
                total=len(prompts), initial=done, desc="generate", unit="prompt", file=sys.stderr, dynamic_ncols=True
            ) as bar,
        ):
            for start in range(done, len(prompts), command.batch_size):
                batch = prompts[start : start + command.batch_size]
                for record in _records(model, batch, command.sampling):
                    failed += "error" in record
                    # Flushed a record at a time: after a kill the complete lines count.
                    print(json_line(record, out.encoding), file=out, flush=True)
                bar.update(len(batch))
    if failed:
        sys.exit(f"vlmamba: {failed} of {len(prompts)} prompts got an error instead of an answer")


def _open_output(output: Path | None) -> contextlib.AbstractContextManager[TextIO]:
    if output is None:
        return contextlib.nullcontext(sys.stdout)
    return open(output, "a", encoding="utf-8", newline="\n")


def _records(model: MambaLM | VLM, prompts: Sequence[Prompt], config: GenerationConfig) -> Iterator[dict[str, Any]]:
    """The record of each prompt of a batch."""
    # Broken prompts are left out of the batch, and get their record in place.
    answers = iter(_answers(model, [p for p in prompts if p.error is None], config))
    for prompt in prompts:
        record: dict[str, Any] = {"prompt": prompt.text} | (
            next(answers) if prompt.error is None else {"error": prompt.error}
        )
        names = [str(image) for image in prompt.images]
        yield record | ({} if not names else {"image": names[0] if len(names) == 1 else names})


def _answers(model: MambaLM | VLM, prompts: Sequence[Prompt], config: GenerationConfig) -> list[dict[str, str]]:
    """Answers or errors. If a batch fails, its prompts are answered one by one, to isolate the one that fails."""
    try:
        return [{"answer": text} for text in answer_together(model, prompts, config)]
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        if len(prompts) == 1:
            return [{"error": describe(e)}]
    return [answer for prompt in prompts for answer in _answers(model, [prompt], config)]


def answer_together(model: MambaLM | VLM, prompts: Sequence[Prompt], config: GenerationConfig) -> list[str]:
    """Answer a batch of prompts.

    Raises:
        ValueError, FileNotFoundError: as `generate`; or a prompt for a language model has an image.
    """
    from ..model.vlm import VLM

    if isinstance(model, VLM):
        return model.generate([p.text for p in prompts], [p.images for p in prompts], config)
    for prompt in prompts:
        if prompt.images:
            raise ValueError(f"the model is a language model and takes no image, got {prompt.images[0]}")
    return model.generate([p.text for p in prompts], config)


_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def json_line(record: dict[str, Any], encoding: str) -> str:
    """Encode a record as one line of JSON.

    Characters are escaped that other readers take for a line break, that a terminal interprets, or that the encoding
    lacks.
    """
    text = json.dumps(record, ensure_ascii=not encoding.lower().startswith("utf"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _settings(command: Generate) -> dict[str, Any]:
    """Everything that answers depend on, by the names of the options; files by a hash of their content."""
    assert command.prompts is not None
    return {
        "model": command.model,
        "content of the model": _digest(fetch_model(command.model)),
        "content of --prompts": fingerprint(command.prompts).sha256,
        "--image": [str(image) for image in command.image],
        "--dtype": command.loading.dtype,
        "--quantize": command.loading.quantize,
        **{f"--{name.replace('_', '-')}": value for name, value in to_json_dict(command.sampling).items()},
    }


def _digest(folder: Path) -> str:
    """A hash of a model's settings, tokenizer and weights."""
    sha256 = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".bin", ".pt"):
            sha256.update(f"{path.relative_to(folder)} {fingerprint(path).sha256}\n".encode())
    return sha256.hexdigest()


def _truncate_output(output: Path, settings: dict[str, Any], prompts: Sequence[Prompt]) -> tuple[int, int]:
    """Truncate a file of answers after its last complete line.

    Returns:
        The number of answers in it, and of errors among them.

    Raises:
        ValueError: another command wrote it, or it was made with other settings; the message names them.
    """
    if output.is_dir():
        raise ValueError(f"--output must name a file, and {output} is a folder")
    beside = output.with_name(output.name + SETTINGS)
    if not beside.exists():
        if output.exists() and output.stat().st_size:
            raise ValueError(f"--output {output} was not written by this command: there is no {beside}")
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(beside, json.dumps(settings, indent=2) + "\n")
        return 0, 0
    # Settings that differ would mix answers of two kinds in one file.
    old = read_json(beside)
    for name, value in settings.items():
        if not isinstance(old, dict) or old.get(name) != value:
            stored = old.get(name) if isinstance(old, dict) else old
            raise ValueError(
                f"--output {output} was made with another {name}: {stored!r}, and not {value!r}. Name another file"
            )
    # An answer counts if its line is complete and its prompt is the one at that place.
    done = failed = end = 0
    for line, prompt in zip(json_lines(output), prompts, strict=False):
        if line.value is None or line.value.get("prompt") != prompt.text:
            break
        done, failed, end = done + 1, failed + ("error" in line.value), line.end
    if output.exists() and end < output.stat().st_size:
        os.truncate(output, end)
    return done, failed
