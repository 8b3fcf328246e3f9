"""The commands that use a model, as they are typed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmamba.connectors import ConnectorConfig
from vlmamba.model import (
    VLM,
    GenerationConfig,
    ImageProcessor,
    LMConfig,
    MambaLM,
    Tokenizer,
    Turn,
    VisionConfig,
    ViTConfig,
    VLMConfig,
)
from vlmamba.model.inspect import inspect
from vlmamba.train import cli
from vlmamba.train.inference import pasted_path, read_prompts

TOKENIZER = Tokenizer.train(["what color is the shape?", "a red circle", "a blue triangle"] * 5, 320)
FEW = GenerationConfig(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two images and two saved models, one of which sees images."""
    folder = tmp_path_factory.mktemp("cli")
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
    Image.new("RGB", (40, 30), "red").save(folder / "two words.png")
    torch.manual_seed(0)
    language = LMConfig(32, 2, 320, "mamba2", d_state=8, headdim=16, tie_embeddings=False)
    vision = VisionConfig(ViTConfig(32, 8, 16, 2, 2, 32), ImageProcessor(32))
    vlm = VLM(VLMConfig(language, (vision,), ConnectorConfig("mlp"), template="zephyr"), TOKENIZER)
    lm = MambaLM(language)
    lm.tokenizer = TOKENIZER
    with torch.no_grad():
        for model in (vlm.language_model, lm):
            model.lm_head.weight.mul_(20)
            model.lm_head.weight[TOKENIZER.eos_id] = 0
            model.backbone.embedding.weight.mul_(20)
            for layer in model.backbone.layers:
                layer.mixer.out_proj.weight.mul_(20)
                layer.mixer.A_log.sub_(4)  # a slow decay: what was said before still counts
    vlm.save_pretrained(folder / "vlm")
    lm.save_pretrained(folder / "lm")
    return folder


@pytest.fixture(scope="module")
def vlm(folder):
    return VLM.from_pretrained(folder / "vlm")


@pytest.fixture(scope="module")
def lm(folder):
    return MambaLM.from_pretrained(folder / "lm")


def run(capsys, *arguments) -> str:
    cli.main([str(a) for a in arguments])
    return capsys.readouterr().out


def test_one_question(folder, vlm, lm, capsys):
    red = folder / "red.png"
    out = run(capsys, "generate", folder / "vlm", "what color?", "--image", red, "--max-new-tokens", 6)
    assert out == vlm.generate(["what color?"], [red], FEW)[0] + "\n"
    out = run(capsys, "generate", folder / "vlm", "what color?", "--max-new-tokens", 6, "--dtype", "fp32")
    assert out == vlm.generate(["what color?"], [None], FEW)[0] + "\n"
    out = run(capsys, "generate", folder / "lm", "a red", "--max-new-tokens", 6, "--temperature", 2, "--seed", 5)
    assert out == lm.generate(["a red"], GenerationConfig(6, temperature=2, seed=5))[0] + "\n"
    half = MambaLM.from_pretrained(folder / "lm", dtype=torch.bfloat16)
    out = run(capsys, "generate", folder / "lm", "a red", "--max-new-tokens", 6, "--dtype", "bf16", "--device", "cpu")
    assert out == half.generate(["a red"], FEW)[0] + "\n"


def test_questions_of_a_file(folder, vlm, lm, capsys):
    lines = folder / "prompts.txt"
    lines.write_text("what color?\n\na red\nwhat is the shape of it?\n")
    prompts = ["what color?", "a red", "what is the shape of it?"]
    out = run(capsys, "generate", folder / "lm", "--prompts", lines, "--max-new-tokens", 6, "--batch-size", 2)
    want = lm.generate(prompts, FEW)
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": p, "answer": a} for p, a in zip(prompts, want, strict=True)
    ]
    records = folder / "prompts.jsonl"
    records.write_text('{"prompt": "what color?", "image": "blue.png"}\n{"prompt": "a red"}\n')
    cli.main(["generate", str(folder / "vlm"), "--prompts", str(records), "--image", str(folder / "red.png"),
              "--max-new-tokens", "6"])  # fmt: skip
    captured = capsys.readouterr()
    images = [folder / "blue.png", folder / "red.png"]
    want = vlm.generate(["what color?", "a red"], images, FEW)
    assert [json.loads(line) for line in captured.out.splitlines()] == [
        {"prompt": p, "answer": a, "image": str(i)}
        for p, a, i in zip(["what color?", "a red"], want, images, strict=True)
    ]
    assert "2/2" in captured.err  # progress does not mix with answers


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r'p.jsonl:2: expected a record with a text "prompt", got \[1\]'),
        ('{"prompt": 3}', r'p.jsonl:2: expected a record with a text "prompt"'),
        ('{"prompt": "a", "image": "nowhere.png"}', r"p.jsonl:2: \"image\" must be the path of a file, got 'nowhere"),
        ("{", r"p.jsonl:2: not JSON"),
    ],
)
def test_a_malformed_record_is_named_by_its_line(line, message, tmp_path):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate {0}/lm", "give either a prompt or --prompts FILE"),
        ("generate {0}/lm a --prompts {0}/prompts.txt", "give either a prompt or --prompts FILE"),
        ("generate {0}/lm a --image {0}/red.png", "is a language model, which sees no image"),
        ("generate {0}/vlm a --image {0}/vlm/config.json", "is not an image that can be read"),
        ("generate {0}/lm --prompts {0}/nowhere", "no prompts at "),
        ("generate {0}/lm a --temperature=-1", "temperature must not be negative"),
        ("generate {0}/nowhere a", "no folder at"),
        ("generate {0}/lm a --device cuda", "torch sees no GPU"),
        ("chat {0}/lm --image {0}/red.png", "which sees no image"),
        ("inspect {0}", "several models: give the folder of one"),
        ("inspect {0}/nothing", "no folder at"),
        ("convert {0}/vlm {0}/out --to transformers", "is for a language model"),
        ("convert {0}/lm {0}/vlm --to own", "exists and is not empty"),
    ],
)
def test_what_goes_wrong_is_one_line_on_stderr(arguments, message, folder):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        cli.main([a.format(folder) for a in arguments.split(" ")])
    text = str(end.value)
    assert text.startswith("vlmamba: ") and message in text and "\n" not in text


def chat(monkeypatch, capsys, lines, *arguments) -> str:
    """What is printed while these lines are typed."""
    typed = iter(lines)

    def type_line(prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_line)
    out = run(capsys, "chat", *arguments, "--max-new-tokens", 6)
    assert next(typed, None) is None
    return out


def test_chat_remembers_what_was_said(folder, vlm, monkeypatch, capsys):
    red, blue = folder / "red.png", folder / "blue.png"
    turns = [Turn("user", "what color?")]
    first = vlm.generate([turns], [red], FEW)[0]
    turns += [Turn("assistant", first), Turn("user", "and the shape?")]
    second = vlm.generate([turns], [red], FEW)[0]
    anew = [vlm.generate(["what color?"], [image], FEW)[0] for image in (blue, None)]
    lines = [
        "what color?", "and the shape?", f"/image {blue}", "what color?", "/reset", "what color?", "", EOFError(),
    ]  # fmt: skip
    out = chat(monkeypatch, capsys, lines, folder / "vlm", "--image", red)
    assert out.rstrip("\n") == "\n".join([first, second, *anew]).rstrip("\n")
    alone = vlm.generate(["and the shape?"], [red], FEW)[0]
    out = chat(monkeypatch, capsys, [*lines[:2], "/quit"], folder / "vlm", "--image", red, "--no-history")
    assert out == f"{first}\n{alone}\n"
    assert second != alone


def test_chat_goes_on_after_a_mistake(folder, monkeypatch, capsys):
    lines = ["/image", "/image nowhere.png", "/dance now", "/help", KeyboardInterrupt(), "/quit"]
    out = chat(monkeypatch, capsys, lines, folder / "vlm").splitlines()
    assert out[0] == "/image needs the path of an image"
    assert out[1] == "no image at nowhere.png"
    assert out[2] == "no command /dance; there are /image, /reset, /help and /quit"
    assert out[3].startswith("/image PATH")
    assert out[-1] == "/quit or Ctrl-D ends"


def test_chat_says_on_request_what_it_took(folder, monkeypatch, capsys):
    typed = iter(["what color?", "and?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    cli.main(["chat", str(folder / "vlm"), "--verbose", "--max-new-tokens", "6"])
    form = r"\[\d+ tokens read in [\d.]+ s; 6 written, [\d.]+ a second; state ([\d.]+) KiB\]"
    state = inspect(folder / "vlm").state_bytes
    assert re.findall(form, capsys.readouterr().err) == [f"{state / 1024:.1f}"] * 2


def test_a_language_model_talks_by_a_template_or_goes_on(folder, lm, monkeypatch, capsys):
    out = chat(monkeypatch, capsys, ["a red", "a red", "/quit"], folder / "lm")
    assert out == f"{lm.generate(['a red'], FEW)[0]}\n" * 2
    out = chat(monkeypatch, capsys, ["a red", "/quit"], folder / "lm", "--template", "qa")
    assert out == f"{lm.generate(['a red' + chr(10)], FEW)[0]}\n"


def test_paths_as_terminals_paste_them(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for text in ("two words.png", "'two words.png'", '"two words.png"', r"two\ words.png"):
        assert pasted_path(text) == Path("two words.png")
    assert pasted_path("it's") == Path("it's")


def test_inspect_in_words_and_in_json(folder, capsys):
    report = inspect(str(folder / "vlm"))
    assert run(capsys, "inspect", folder / "vlm") == f"{report}\n"
    assert json.loads(run(capsys, "inspect", folder / "vlm", "--json")) == report.to_json()
    half = json.loads(run(capsys, "inspect", folder / "vlm", "--json", "--dtype", "bf16"))
    assert half["weight_bytes"] < 0.6 * report.weight_bytes


def test_convert_there_and_back(folder, lm, tmp_path, capsys):
    there, back = tmp_path / "there", tmp_path / "back"
    for layout in ("transformers", "state-spaces"):
        assert run(capsys, "convert", folder / "lm", there / layout, "--to", layout) == f"wrote {there / layout}\n"
        run(capsys, "convert", there / layout, back / layout, "--to", "own")
        again = MambaLM.from_pretrained(back / layout)
        for name, tensor in lm.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("command", ["demo", "train", "ablate", "evaluate", "generate", "chat", "inspect", "convert"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: vlmamba {command}" in capsys.readouterr().out


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *command: str):
        pid, self.fd = pty.fork()
        if pid == 0:
            os.execvpe(command[0], command, {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"})
        self.pid, self.seen = pid, ""

    def until(self, text: str, seconds: float = 60) -> str:
        """What the program writes until it has written this."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come; there is {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        given, self.seen = self.seen.split(text, 1)
        return given

    def until_more(self, seconds: float = 60) -> None:
        """Wait until the program writes something that `until` has not given yet."""
        if not self.seen:
            assert select.select([self.fd], [], [], seconds)[0], "nothing more came"

    def type(self, text: str, until: str | None = None, seconds: float = 60) -> None:
        """Type a text; with `until`, again and again until the program writes that."""
        os.write(self.fd, text.encode())
        end = time.monotonic() + seconds
        while until is not None and until not in self.seen:
            assert time.monotonic() < end, f"{until!r} did not come; there is {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
            else:
                os.write(self.fd, text.encode())

    def ended(self) -> int:
        """The exit status, when the program is at its end."""
        with contextlib.suppress(OSError):  # Linux gives an error at the end
            while os.read(self.fd, 4096):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_chat_in_a_terminal(folder):
    """Ctrl-C stops an answer and not the program; the arrow key brings back the line before."""
    terminal = Terminal(
        sys.executable, "-m", "vlmamba.train.cli", "chat", str(folder / "vlm"), "--max-new-tokens", "1000000"
    )
    try:
        terminal.until("> ")
        terminal.type("what color?\n")
        terminal.until("what color?\r\n")
        terminal.until_more()  # into the answer
        terminal.type("\x03")
        terminal.until(" [stopped]")
        terminal.until("> ")
        terminal.type(f"/image {folder / 'nowhere.png'}\n")
        terminal.until("no image at")
        terminal.until("> ")
        if importlib.util.find_spec("readline"):
            terminal.type("\x1b[A\n")
            terminal.until("no image at")
            terminal.until("> ")
        terminal.type("\x03", until="/quit or Ctrl-D ends")  # readline writes the prompt before it watches for signals
        terminal.type("/quit\n")
        assert terminal.ended() == 0
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise


def test_output_that_nobody_reads_is_no_error(folder, monkeypatch):
    """As with `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", str(folder / "lm"), "a red", "--max-new-tokens", "3"])
        assert end.value.code == 1
        nobody.write("what is still to be written")
