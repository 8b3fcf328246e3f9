"""The commands that use a model, as they are typed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.makers import VISION, language_config, save_images, shape_tokenizer, sharpen
from vlmamba import cli
from vlmamba.command_line import printable
from vlmamba.commands import prompt_file
from vlmamba.commands.chat import completions, pasted_path
from vlmamba.commands.prompt_file import MAX_CHARACTERS, json_line, read_prompts
from vlmamba.commands.streaming import hold_first
from vlmamba.connectors import ConnectorConfig
from vlmamba.interrupts import after_imports
from vlmamba.model import (
    VLM,
    GenerationConfig,
    MambaLM,
    Turn,
    VLMConfig,
)
from vlmamba.model.chat import Conversation
from vlmamba.model.inspect import inspect

TOKENIZER = shape_tokenizer()
FEW = GenerationConfig(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two images and two saved models, one of which sees images."""
    folder = tmp_path_factory.mktemp("cli")
    red, _ = save_images(folder, ("red", "blue"))
    shutil.copy(red, folder / "two words.png")
    torch.manual_seed(0)
    language = language_config("mamba2")
    vlm = VLM(VLMConfig(language, (VISION,), ConnectorConfig("mlp"), template="zephyr"), TOKENIZER)
    lm = MambaLM(language, TOKENIZER)
    for model in (vlm.language_model, lm):
        sharpen(model)
        with torch.no_grad():
            model.lm_head.weight[TOKENIZER.eos_id] = 0
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
    assert out == printable(vlm.generate(["what color?"], [red], FEW)[0]) + "\n"
    out = run(capsys, "generate", folder / "vlm", "what color?", "--max-new-tokens", 6, "--dtype", "fp32")
    assert out == printable(vlm.generate(["what color?"], [None], FEW)[0]) + "\n"
    out = run(capsys, "generate", folder / "lm", "a red", "--max-new-tokens", 6, "--temperature", 2, "--seed", 5)
    assert out == printable(lm.generate(["a red"], GenerationConfig(6, temperature=2, seed=5))[0]) + "\n"
    half = MambaLM.from_pretrained(folder / "lm", dtype=torch.bfloat16)
    out = run(capsys, "generate", folder / "lm", "a red", "--max-new-tokens", 6, "--dtype", "bf16", "--device", "cpu")
    assert out == printable(half.generate(["a red"], FEW)[0]) + "\n"


def test_a_draft_model_proposes_tokens(folder, lm, vlm, capsys):
    cli.main(["generate", str(folder / "lm"), "a red", "--draft", str(folder / "lm"), "--max-new-tokens", "6"])
    printed = capsys.readouterr()
    assert printed.out == printable(lm.generate(["a red"], FEW)[0]) + "\n"
    assert "draft: 4 of 4 proposed tokens accepted (100%): 5.00 tokens a step of the model" in printed.err
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", str(folder / "vlm"), "a red", "--draft", str(folder / "lm")])
    assert "--draft must be a model of the same kind" in str(end.value.code)
    red = folder / "red.png"
    cli.main(["generate", str(folder / "vlm"), "what color?", "--image", str(red), "--draft", str(folder / "vlm"),
              "--max-new-tokens", "6"])  # fmt: skip
    printed = capsys.readouterr()
    assert printed.out == printable(vlm.generate(["what color?"], [red], FEW)[0]) + "\n"
    assert "4 of 4 proposed tokens accepted (100%)" in printed.err


def test_a_question_about_several_images(folder, vlm, capsys):
    question, images = "is <image> as red as <image>?", [folder / "red.png", folder / "blue.png"]
    (want,) = vlm.generate([question], [images], FEW)
    out = run(capsys, "generate", folder / "vlm", question, "--image", *images, "--max-new-tokens", 6)
    assert out == want + "\n"
    (folder / "frames").mkdir()
    for image in images:
        shutil.copy(image, folder / "frames")
    out = run(capsys, "generate", folder / "vlm", "what?", "--video", folder / "frames", "--max-new-tokens", 6)
    # Frames are in the order of their names.
    assert out == printable(vlm.generate(["<image><image>what?"], [images[::-1]], FEW)[0]) + "\n"
    prompts = folder / "several.jsonl"
    prompts.write_text(json.dumps({"prompt": question, "image": ["red.png", "blue.png"]}))
    answer = json.loads(run(capsys, "generate", folder / "vlm", "--prompts", prompts, "--max-new-tokens", 6))
    assert answer == {"prompt": question, "answer": want, "image": [str(i) for i in images]}
    with pytest.raises(SystemExit, match="got 2 marks .2 in turn 0. for 1 images"):
        cli.main(["generate", str(folder / "no model"), question, "--image", str(images[0])])


def test_questions_of_a_file(folder, vlm, lm, capsys):
    lines = folder / "prompts.txt"
    lines.write_text("what color?\n\na red\nwhat is the shape of it?\n")
    texts = ["what color?", "a red", "what is the shape of it?"]
    out = run(capsys, "generate", folder / "lm", "--prompts", lines, "--max-new-tokens", 6, "--batch-size", 2)
    want = lm.generate(texts, FEW)
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": p, "answer": a} for p, a in zip(texts, want, strict=True)
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
        (b"[1]", r'expected a record with a text "prompt", got \[1\]'),
        (b'{"prompt": 3}', r'expected a record with a text "prompt"'),
        (b'{"prompt": "a", "image": "nowhere.png"}', "no image at .*nowhere.png"),
        (b'{"prompt": "a", "image": ["nowhere.png"]}', "no image at .*nowhere.png"),
        (b'{"prompt": "a", "image": "broken.png"}', "broken.png is not an image that can be read"),
        (b'{"prompt": "a", "image": ["a.png", "b.png"]}', "got 0 marks for 2 images"),
        (b'{"prompt": "a", "image": [3]}', r'"image" must be the path of a file or a list of paths, got \[3\]'),
        (b"{", "not valid JSON|Expecting property name"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "\\ud83d"}', "half a surrogate pair"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff"),
        (b'{"prompt": "' + b"a" * (MAX_CHARACTERS + 1) + b'"}', "at most 1,048,576 characters, got 1,048,577"),
    ],
    ids=str,
)
def test_a_malformed_record_is_an_error_that_names_its_line_and_the_others_load(line, message, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n' + line + b'\r\n{"prompt": "b"}\n')
    first, broken, last = read_prompts(tmp_path / "p.jsonl")
    assert (first.text, first.error, last.text, last.error) == ("a", None, "b", None)
    assert broken.error.startswith(f"{tmp_path / 'p.jsonl'}:2: ") and re.search(message, broken.error)


def test_lines_of_prompts_end_at_a_line_feed_alone(tmp_path):
    texts = ["a\u2028b", "c\x0cd\x85e\rf", "g"]
    (tmp_path / "p.txt").write_bytes("\ufeff{}\n{}\r\n{}".format(*texts).encode())
    assert [p.text for p in read_prompts(tmp_path / "p.txt")] == texts
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": t}, ensure_ascii=False) + "\n" for t in texts))
    assert [p.text for p in read_prompts(tmp_path / "p.jsonl")] == texts
    (tmp_path / "p.txt").write_bytes("a\nb".encode("utf-16"))
    with pytest.raises(ValueError, match="is UTF-16; save it as UTF-8"):
        read_prompts(tmp_path / "p.txt")


@pytest.fixture
def five(folder, tmp_path) -> Path:
    """Five prompts, of which the second is broken."""
    lines = ["a red", "", "a blue", "what", "the shape"]
    records = [json.dumps({"prompt": line}) for line in lines]
    records[1] = '{"prompt": 3}'
    (tmp_path / "five.jsonl").write_text("\n".join(records) + "\n")
    return tmp_path / "five.jsonl"


def generate_to(out: Path, folder: Path, prompts: Path, *more: object) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", str(folder / "lm"), "--prompts", str(prompts), "--output", str(out),
                  "--max-new-tokens", "6", "--batch-size", "2", *map(str, more)])  # fmt: skip
    assert end.value.code == "vlmamba: 1 of 5 prompts got an error instead of an answer"


def test_answers_go_to_a_file_that_the_same_command_resumes(folder, lm, five, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "answers.jsonl"
    generate_to(out, folder, five)
    whole = out.read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    right = ["a red", "a blue", "what", "the shape"]
    want = [{"prompt": p, "answer": a} for p, a in zip(right, lm.generate(right, FEW), strict=True)]
    assert [r for r in records if "answer" in r] == want
    assert "five.jsonl:2: expected a record" in records[1]["error"]

    asked = []
    together = prompt_file.answer_together
    monkeypatch.setattr(prompt_file, "answer_together", lambda m, p, c: asked.extend(p) or together(m, p, c))
    out.write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 20])  # killed within a line
    whole_lines = out.read_bytes().count(b"\n")
    generate_to(out, folder, five)
    assert out.read_bytes() == whole
    assert [p.text for p in asked] == [r["prompt"] for r in records[whole_lines:] if "answer" in r]

    asked.clear()
    generate_to(out, folder, five)
    assert not asked and "all 5 prompts are answered" in capsys.readouterr().err
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[:3], b"dam\x00aged\n", lines[4]]))
    generate_to(out, folder, five)
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--temperature", "0.5"), "made with another --temperature: 0.0, and not 0.5"),
        (("--dtype", "fp32"), "made with another --dtype: None, and not 'fp32'"),
        ("prompts", "made with another content of --prompts"),
        ("model", "made with another content of the model"),
        ("alien", "was not written by this command"),
    ],
    ids=str,
)
def test_answers_that_were_made_otherwise_are_not_gone_on_with(change, message, folder, five, tmp_path):
    model, out = tmp_path / "lm", tmp_path / "answers.jsonl"
    shutil.copytree(folder / "lm", model)
    command = ["generate", str(model), "--prompts", str(five), "--output", str(out), "--max-new-tokens", "2"]
    if change == "alien":
        out.write_text("mine\n")
    else:
        with pytest.raises(SystemExit):
            cli.main(command)
    kept = out.read_bytes()
    if change == "prompts":
        five.write_text(five.read_text() + '{"prompt": "one more"}\n')
    elif change == "model":
        (model / "generation_config.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        cli.main([*command, *(change if isinstance(change, tuple) else ())])
    assert message in str(end.value)
    assert out.read_bytes() == kept


def test_a_prompt_that_fails_while_it_is_answered_is_found_out(folder, lm, five, tmp_path, monkeypatch):
    """Memory that runs out for one prompt of a batch is that prompt's error."""
    together = prompt_file.answer_together

    def answer(model, batch, config):
        if any(p.text == "a blue" for p in batch):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")
        if any(p.text == "what" for p in batch):
            raise MemoryError
        return together(model, batch, config)

    monkeypatch.setattr(prompt_file, "answer_together", answer)
    out = tmp_path / "answers.jsonl"
    with pytest.raises(SystemExit, match="3 of 5 prompts got an error"):
        cli.main(["generate", str(folder / "lm"), "--prompts", str(five), "--output", str(out),
                  "--max-new-tokens", "6", "--batch-size", "5"])  # fmt: skip
    records = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [r.get("answer") for r in records[::4]] == lm.generate(["a red", "the shape"], FEW)
    assert [r.get("error") for r in records[2:4]] == ["OutOfMemoryError: CUDA out of memory.", "memory ran out"]


def test_images_are_looked_at_before_the_model_is_loaded(folder, tmp_path):
    (tmp_path / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    with pytest.raises(SystemExit, match="broken.png is not an image that can be read"):
        cli.main(["generate", str(tmp_path / "no model"), "what?", "--image", str(tmp_path / "broken.png")])


def test_control_characters_are_escaped():
    assert printable("a\tb\nc é 你\x1b[2J\x07\r\x9b\u202e") == "a\tb\nc é 你\\x1b[2J\\x07\\r\\x9b\\u202e"
    record = {"answer": "\x1b\x7f\x9b\u2028 é 😀 \ud83d"}
    for encoding in ("utf-8", "latin-1", "ascii"):
        line = json_line(record, encoding)
        assert json.loads(line) == record
        assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\ud800-\udfff]", line)
        line.encode(encoding)


ANSWERS_WITH_EVERYTHING = """
import sys
from vlmamba.model import MambaLM
from vlmamba import cli
MambaLM.stream = lambda *a, **options: iter(["\x1b[31mred ", "你 😀"])
MambaLM.generate = lambda self, prompts, config: ["\x1b 你 😀"] * len(prompts)
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_an_answer_that_the_terminal_cannot_show_does_not_end_the_run(folder, five):
    command = [sys.executable, "-c", ANSWERS_WITH_EVERYTHING, "generate", str(folder / "lm")]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([*command, "a"], capture_output=True, env=environment, check=True)
    assert done.stdout == rb"\x1b[31mred \u4f60 \U0001f600" + b"\n"
    done = subprocess.run([*command, "--prompts", str(five)], capture_output=True, env=environment, check=False)
    records = [json.loads(line) for line in done.stdout.decode("latin-1").splitlines()]
    assert [r.get("answer") for r in records] == ["\x1b 你 😀", None, *["\x1b 你 😀"] * 3]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_a_signal_leaves_what_is_answered(number, status, folder, five, tmp_path):
    """And the same command goes on."""
    out = tmp_path / "answers.jsonl"
    command = [sys.executable, "-c", SLOW_AFTER_TWO, "generate", str(folder / "lm"), "--prompts", str(five),
               "--output", str(out), "--max-new-tokens", "6", "--batch-size", "2"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    assert process.wait(60) == status
    process.stdout.close()
    assert len(out.read_text().splitlines()) == 2
    generate_to(out, folder, five)
    assert len(out.read_text().splitlines()) == 5


SLOW_AFTER_TWO = """
import signal, sys, time
from vlmamba import cli
from vlmamba.commands import prompt_file
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
together = prompt_file.answer_together
def answer(model, batch, config):
    if batch[0].text != "a red":
        print("waiting", flush=True)
        time.sleep(600)
    return together(model, batch, config)
prompt_file.answer_together = answer
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate {0}/lm", "give either a prompt or --prompts FILE"),
        ("generate {0}/lm a --prompts {0}/prompts.txt", "give either a prompt or --prompts FILE"),
        ("generate {0}/lm a --image {0}/red.png", "is a language model and takes no image"),
        ("generate {0}/vlm a --image {0}/vlm/config.json", "is not an image that can be read"),
        ("generate {0}/lm --prompts {0}/nowhere", "no prompts at "),
        ("generate {0}/lm a --temperature=-1", "temperature must not be negative"),
        ("generate {0}/lm a --temperature nan", "temperature must be a finite number, got nan"),
        ("generate {0}/lm a --output {0}/out", "--output is for the answers to --prompts"),
        ("generate {0}/lm --prompts {0}/vlm/config.json --output {0}", "--output must name a file, and "),
        ("generate {0}/lm a --image a\x1b", "no image at a\\x1b"),
        ("generate ~nosuchuser/x a", "~nosuchuser/x starts with the home folder of an unknown user"),
        ("generate {0}/nowhere a", "no folder at"),
        ("generate {0}/lm a --device cuda", "torch sees no GPU"),
        ("chat {0}/lm --image {0}/red.png", "which sees no image"),
        ("inspect {0}", "several models: give the folder of one"),
        ("inspect {0}/nothing", "no folder at"),
        ("convert {0}/vlm {0}/out --to transformers", "is for a language model"),
        ("convert {0}/lm {0}/vlm --to own", "exists and is not empty"),
        ("export {0}/vlm --onnx {0}/graphs", "is a vision-language model"),
    ],
)
def test_an_error_is_one_line_on_stderr(arguments, message, folder):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        cli.main([a.format(folder) for a in arguments.split(" ")])
    text = str(end.value)
    assert text.startswith("vlmamba: ") and message in text and "\n" not in text


@pytest.mark.parametrize("command", ["generate {} a", "chat {}", "evaluate {}", "convert {} out --to own",
                                     "export {} --onnx out", "serve {}"])  # fmt: skip
def test_a_model_s_name_means_the_same_to_every_command(command, tmp_path, monkeypatch):
    """A preset or a recipe has no weights yet, which is said without a network; a slip gets the nearest name."""
    monkeypatch.chdir(tmp_path)
    for name, message in [
        ("ml-mamba-3b", "is a preset: pretrained parts and a connector without weights. `vlmamba train ml-mamba-3b"),
        ("vl-mamba", "`vlmamba inspect vl-mamba` describes it"),
        ("ml-mamba-3", "no folder, preset or recipe 'ml-mamba-3'; did you mean 'ml-mamba-3b'?"),
        ("gpt2", "no folder, preset or recipe 'gpt2'; a name on the Hugging Face Hub has the form owner/model"),
    ]:
        with pytest.raises(SystemExit) as end:
            cli.main(command.format(name).split())
        assert message in str(end.value)


def test_a_recipe_is_inspected_as_the_model_of_its_paper(capsys):
    assert run(capsys, "inspect", "vl-mamba").startswith("vl-mamba-2.8b: VLM, format preset")


def chat(monkeypatch, capsys, lines, *arguments) -> str:
    """Run a conversation with these lines as its input, and return its output."""
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


def test_chat_keeps_the_history(folder, vlm, monkeypatch, capsys):
    red, blue = folder / "red.png", folder / "blue.png"
    turns = [Turn("user", "what color?")]
    first = vlm.generate([turns], [red], FEW)[0]
    turns += [Turn("assistant", first), Turn("user", "and the shape?")]
    second = vlm.generate([turns], [red], FEW)[0]
    marked = [Turn("user", "<image>\nwhat color?"), *turns[1:], Turn("assistant", second)]
    third = vlm.generate([[*marked, Turn("user", "<image>\nwhat color?")]], [[red, blue]], FEW)[0]
    anew = vlm.generate(["what color?"], [None], FEW)[0]
    lines = [
        "what color?", "and the shape?", f"/image {blue}", "what color?", "/reset", "what color?", "", EOFError(),
    ]  # fmt: skip
    out = chat(monkeypatch, capsys, lines, folder / "vlm", "--image", red)
    assert out.rstrip("\n") == "\n".join([first, second, third, anew]).rstrip("\n")
    alone = vlm.generate(["and the shape?"], [red], FEW)[0]
    out = chat(monkeypatch, capsys, [*lines[:2], "/quit"], folder / "vlm", "--image", red, "--no-history")
    assert out == f"{first}\n{alone}\n"
    assert second != alone


def test_chat_continues_after_a_mistake(folder, monkeypatch, capsys):
    lines = ["/image", "/image nowhere.png", "/dance now", "/help", KeyboardInterrupt(), "/quit"]
    out = chat(monkeypatch, capsys, lines, folder / "vlm").splitlines()
    assert out[0] == "/image needs the path of an image"
    assert out[1] == "no image at nowhere.png"
    assert out[2] == "no command /dance; there are /image, /video, /reset, /help and /quit"
    assert out[3].startswith("/image PATH")
    assert out[-1] == "/quit or Ctrl-D quits"


def test_chat_survives_what_is_typed_and_what_fails(folder, vlm, tmp_path, monkeypatch, capsys):
    """A line names each cause, and the conversation goes on as if it had not been said."""
    (tmp_path / "broken.png").write_bytes((folder / "red.png").read_bytes()[:60])
    red = folder / "red.png"
    turns = [Turn("user", "what color?")]
    turns += [Turn("assistant", vlm.generate([turns], [red], FEW)[0]), Turn("user", "and the shape?")]
    mistakes = [
        ("/image ~nosuchuser/x", "~nosuchuser/x starts with the home folder of an unknown user"),
        (f"/image {tmp_path / 'broken.png'}", "broken.png is "),
        (f"/image {'x' * 5000}", "File name too long"),
        ("/image a\x00b", "no image at a\\x00b"),
        ("half a \ud83d pair", r"the text is not UTF-8: it has '\ud83d' after 7 characters"),
        ("not utf-8: \udcff", r"the text is not UTF-8: it has '\udcff'"),
        ("a" * (MAX_CHARACTERS + 1), "the text must have at most 1,048,576 characters, got 1,048,577"),
    ]  # fmt: skip
    lines = ["what color?", *(line for line, _ in mistakes), "and the shape?", "/quit"]
    out = chat(monkeypatch, capsys, lines, folder / "vlm", "--image", red)
    first, last = turns[1].text, vlm.generate([turns], [red], FEW)[0]
    assert out.startswith(first + "\n") and out.endswith(f"{last}\n")
    said = out.removeprefix(first + "\n").removesuffix(f"{last}\n").splitlines()
    assert len(said) == len(mistakes)
    for line, (_, message) in zip(said, mistakes, strict=True):
        assert message in line


def test_memory_that_runs_out_ends_the_turn_and_not_the_conversation(folder, vlm, monkeypatch, capsys):
    red = folder / "red.png"
    turns = [Turn("user", "what color?")]
    turns += [Turn("assistant", vlm.generate([turns], [red], FEW)[0]), Turn("user", "and the shape?")]
    failures = iter(
        [None, torch.OutOfMemoryError("CUDA out of memory.\nmore"), MemoryError(), RuntimeError("no"), None]
    )
    ask = Conversation.ask

    def failing(self, text):
        if failure := next(failures):
            raise failure
        yield from ask(self, text)

    monkeypatch.setattr(Conversation, "ask", failing)
    lines = ["what color?", "a", "b", "c", "and the shape?", "/quit"]
    out = chat(monkeypatch, capsys, lines, folder / "vlm", "--image", red)
    last = vlm.generate([turns], [red], FEW)[0]
    said = "OutOfMemoryError: CUDA out of memory.\nmemory ran out\nRuntimeError: no"
    assert out == f"{turns[1].text}\n{said}\n{last}\n"


def test_chat_reads_what_is_not_utf_8(folder):
    """The other lines of the same input are not lost."""
    command = [sys.executable, "-m", "vlmamba", "chat", str(folder / "lm"), "--max-new-tokens", "3"]
    done = subprocess.run(command, input=b"/nothing\n\xff\xfe\n/help\n", capture_output=True, check=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})  # fmt: skip
    nothing, wrong, *rest = done.stdout.decode().splitlines()
    assert "no command /nothing" in nothing and "the text is not UTF-8" in wrong and "/image PATH" in rest[0]


WARNS_AT_THE_FIRST_STEP = """
import logging, sys
from vlmamba import cli
from vlmamba.model.generation.decoding import Decoder
step, seen = Decoder.step, []
def warning(*arguments, **options):
    if not seen:
        seen.append(1)
        logging.getLogger("ssm_kernels").warning("compiling")
    return step(*arguments, **options)
Decoder.step = warning
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_warning_of_the_first_step_is_before_the_answer(command, folder, lm):
    """Such as the line that kernels are compiled, at the first call on a machine."""
    words = [sys.executable, "-c", WARNS_AT_THE_FIRST_STEP, command, str(folder / "lm"), "--max-new-tokens", "6"]
    words += ["a red"] if command == "generate" else []
    done = subprocess.run(
        words, input="a red\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, text=True
    )
    answer = printable(lm.generate(["a red"], FEW)[0])
    assert len(answer) > 6
    assert "WARNING: compiling\n" in done.stdout and f"\n{answer}\n" in done.stdout


def test_an_answer_that_is_stopped_at_its_first_step_has_its_first_part():
    def texts():
        yield "a"
        raise KeyboardInterrupt

    held = hold_first(texts())
    assert next(held) == "a"
    with pytest.raises(KeyboardInterrupt):
        next(held)
    assert [*hold_first(iter([]))] == [] and [*hold_first(iter("abcd"))] == ["ab", "c", "d"]


def test_chat_reports_statistics_on_request(folder, monkeypatch, capsys):
    typed = iter(["what color?", "and?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    cli.main(["chat", str(folder / "vlm"), "--verbose", "--max-new-tokens", "6"])
    form = r"\[\d+ prompt tokens in [\d.]+ s; 6 generated, [\d.]+ tokens/s; state ([\d.]+) KiB\]"
    state = inspect(folder / "vlm").state_bytes
    assert re.findall(form, capsys.readouterr().err) == [f"{state / 1024:.1f}"] * 2


def test_a_language_model_answers_by_a_template_or_continues_text(folder, lm, monkeypatch, capsys):
    out = chat(monkeypatch, capsys, ["a red", "a red", "/quit"], folder / "lm")
    assert out == f"{printable(lm.generate(['a red'], FEW)[0])}\n" * 2
    out = chat(monkeypatch, capsys, ["a red", "/quit"], folder / "lm", "--template", "qa")
    assert out == f"{printable(lm.generate(['a red' + chr(10)], FEW)[0])}\n"


def test_chat_says_which_model_and_image_it_has(folder, vlm, monkeypatch, capsys):
    typed = iter([f"/image {folder / 'blue.png'}", "/reset", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    cli.main(["chat", str(folder / "vlm"), "--image", str(folder / "red.png")])
    parameters = sum(p.numel() for p in vlm.parameters())
    width, height = Image.open(folder / "red.png").size
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == [
        f"{folder / 'vlm'} · {parameters:,} parameters · float32 · cpu · image: red.png ({width} x {height}) · "
        "/help lists the commands",
        f"with the next question: image: blue.png ({width} x {height})",
        "started over; no image",
    ]


def test_a_language_model_has_no_image_to_speak_of(folder, monkeypatch, capsys):
    typed = iter(["/reset", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    cli.main(["chat", str(folder / "lm")])
    head, reset = capsys.readouterr().err.splitlines()
    assert "image" not in head and reset == "started over"


def test_tab_completes_commands_and_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert completions("/i") == ["/image "] and completions("/q") == ["/quit"]
    assert completions("what") == [] and completions("") == []
    assert completions("/image r") == ["/image red.png"]
    assert completions("/image two w") == ["/image two words.png"]
    assert completions("/image v") == ["/image vlm/"]
    assert completions(f"/image {folder}/b") == [f"/image {folder}/blue.png"]
    assert completions("/image nowhere/x") == [] and completions("/image ~nosuchuser/x") == []


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


@pytest.mark.parametrize(
    "command", ["demo", "train", "reproduce", "evaluate", "generate", "chat", "inspect", "convert"]
)
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
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            os.execvpe(command[0], command, {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"})
        self.pid, self.seen = pid, ""

    def until(self, text: str, seconds: float = 60) -> str:
        """Read the output of the program up to the text."""
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
    terminal = Terminal(sys.executable, "-m", "vlmamba", "chat", str(folder / "vlm"), "--max-new-tokens", "1000000")
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
        terminal.type("\x03", until="/quit or Ctrl-D quits")  # readline writes the prompt before it watches for signals
        terminal.type("/quit\n")
        assert terminal.ended() == 0
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise


def test_ctrl_c_in_a_chat_waits_for_the_end_of_an_import(folder, monkeypatch):
    """The first answer imports numba, which the next one needs whole."""
    handlers = []
    monkeypatch.setattr("builtins.input", lambda prompt: handlers.append(signal.getsignal(signal.SIGINT)) or "/quit")
    cli.main(["chat", str(folder / "lm")])
    assert handlers == [after_imports] != [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried"), MemoryError()], ids=type)
def test_memory_that_runs_out_is_one_line(error, folder, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(MambaLM, "stream", fail)
    with pytest.raises(SystemExit, match=r"^vlmamba: (OutOfMemoryError: CUDA out of memory\.|memory ran out)$"):
        cli.main(["generate", str(folder / "lm"), "a"])
    monkeypatch.setattr(MambaLM, "stream", lambda *args, **options: [][1])
    with pytest.raises(IndexError):  # a fault of the program keeps its traceback
        cli.main(["generate", str(folder / "lm"), "a"])


def test_output_that_nobody_reads_is_no_error(folder, monkeypatch):
    """The reader closed the pipe (`| head`)."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", str(folder / "lm"), "a red", "--max-new-tokens", "3"])
        assert end.value.code == 1
        nobody.write("what is still to be written")


@pytest.fixture(scope="module")
def lean(folder) -> Path:
    """A language model that is saved in 8 bits."""
    pytest.importorskip("torchao")
    cli.main(["convert", str(folder / "lm"), str(folder / "lean"), "--to", "own", "--quantize", "int8"])
    return folder / "lean"


def test_models_are_quantized_as_they_are_loaded(folder, lean, capsys):
    capsys.readouterr()
    few = ["--max-new-tokens", 6]
    want = printable(MambaLM.from_pretrained(lean).generate(["a red"], FEW)[0]) + "\n"
    assert run(capsys, "generate", folder / "lm", "a red", *few, "--quantize", "int8") == want
    assert run(capsys, "generate", lean, "a red", *few) == want


def commands(folder: Path, model: Path) -> list[list[str]]:
    """A command line of each command that loads a model to run it."""
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a box"}]
    (folder / "one.json").write_text(json.dumps([{"conversations": turns}]))
    data = ["--data", str(folder / "one.json")]
    ends = {"generate": ["a red"], "chat": [], "evaluate": data, "serve": ["--port", "0"]}
    return [[name, str(model), *more] for name, more in ends.items()]


def test_a_model_that_is_quantized_already_is_refused(folder, lean):
    pytest.importorskip("fastapi")
    for command in commands(folder, lean):
        with pytest.raises(SystemExit, match="lean is quantized already: load it without"):
            cli.main([*command, "--quantize", "int4"])


def test_quantizing_without_torchao_says_what_to_install_before_a_model_is_looked_up(folder, monkeypatch):
    pytest.importorskip("fastapi")
    from vlmamba.model import quantize

    quantize._torchao.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    for command in commands(folder, folder / "no model"):
        with pytest.raises(SystemExit, match=r"pip install 'torchao>="):
            cli.main([*command, "--quantize", "int4"])
    quantize._torchao.cache_clear()


def test_an_unknown_quantization_is_a_wrong_command_line(folder, capsys):
    for command in commands(folder, folder / "lm"):
        with pytest.raises(SystemExit) as end:
            cli.main([*command, "--quantize", "int3"])
        assert end.value.code == 2 and "int3" in capsys.readouterr().err
