"""Vision-language models side by side: `ssm-bench prefill` and `decode`."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json

import pytest
import torch

from vlmamba.benchmarks import cli, memory, plots
from vlmamba.benchmarks.inference import command as session
from vlmamba.benchmarks.inference import measure, report
from vlmamba.benchmarks.inference.models import PREFILL_CHUNK, MambaModel, TransformerModel, build
from vlmamba.benchmarks.inference.specs import SAME_SIZE, SPECS
from vlmamba.benchmarks.options import MODELS
from vlmamba.benchmarks.processor import Rates

OURS = ("vl-mamba", "ml-mamba", "ml-mamba-on-mamba1")
TRANSFORMERS = ("transformer-siglip", "transformer-dinov2-siglip", "tinyllava", "mobilevlm-v2")
RATES = Rates(1, read={1 << 27: 1e10}, copy={}, operations=1.0, exponentials=1.0)
SMALL = ["--models", "ml-mamba", "mobilevlm-v2", "--context", "72"]


@pytest.fixture
def quick(monkeypatch):
    """Measures memory in no process of its own, and no bandwidth, and draws nothing."""
    monkeypatch.setattr(measure, "peak_memory", lambda point: 1)
    monkeypatch.setattr(measure, "measure_rates", lambda threads: RATES)
    monkeypatch.setattr(report, "plot", lambda result: b"")


def started(name, batch=2, text=20, extra=16, seed=0):
    """A model, its prompt, the text of it and its number of tokens."""
    pytest.importorskip("transformers")
    spec = SPECS["small"][name]
    model = build(spec, torch.float32, "cpu", 400, seed)
    words = torch.randint(spec.vocab_size, (batch, text), generator=torch.Generator().manual_seed(3))
    n = spec.image_tokens + text
    model.allocate(batch, n + extra)
    return model, model.prompt(model.encode(model.images(batch)), words), words, n


def test_every_published_name_has_a_small_one():
    assert tuple(SPECS["small"]) == tuple(SPECS["130m"]) == tuple(SPECS["published"]) == MODELS
    assert {name for name, spec in SPECS["small"].items() if spec.is_ours} == set(OURS)


@pytest.mark.parametrize("size", SPECS)
def test_what_claims_the_same_size_has_it_and_the_same_encoders(size):
    pytest.importorskip("transformers")
    counts = {n: build(s, torch.bfloat16, "meta", 1).parameters for n, s in SPECS[size].items()}
    for other, mine in SAME_SIZE.items():
        assert counts[other]["language"] == pytest.approx(counts[mine]["language"], rel=0.04)
        assert counts[other]["encoder"] == counts[mine]["encoder"]
        assert SPECS[size][other].vision == SPECS[size][mine].vision
    if size == "published":
        assert counts["vl-mamba"]["language"] == 2_768_345_600
        assert counts["ml-mamba"]["language"] == 2_702_599_680
        assert counts["tinyllava"]["language"] == 2_779_683_840  # Phi-2
        assert counts["mobilevlm-v2"]["language"] == 2_701_560_320  # MobileLLaMA-2.7B
        assert SPECS[size]["mobilevlm-v2"].image_tokens == 144
        assert SPECS[size]["tinyllava"].image_tokens == 729


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_chunks_equals_the_unsplit_one_and_its_state_has_the_size_of_the_formula(name):
    model, prompt, _, n = started(name)
    with torch.inference_mode():
        unsplit = model.prefill(prompt, n, 10 * n).clone()
        torch.testing.assert_close(model.prefill(prompt, n, 7), unsplit, rtol=1e-4, atol=1e-5)
        assert model.state_bytes(n) == 2 * model.spec.state_bytes(n, torch.float32)
        longer = model.state_bytes(n + 10) - model.state_bytes(n)
    lm = model.spec.language
    assert longer == (0 if name in OURS else 2 * 10 * 2 * lm.layers * lm.width * 4)


@pytest.mark.parametrize("name", MODELS)
def test_steps_have_the_logits_of_a_prompt_and_depend_on_image_and_text(name):
    model, prompt, words, n = started(name)
    with torch.inference_mode():
        model.prefill(prompt, n - 1, n)
        stepped = model.step(words[:, -1]).clone()
        torch.testing.assert_close(stepped, model.prefill(prompt, n, n), rtol=1e-4, atol=1e-5)
        other = model.prompt(model.encode(model.images(2)), words)
        assert (model.prefill(other, n, n) - stepped).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ml-mamba", "transformer-siglip"])
def test_a_random_state_has_the_place_of_a_prompt_s(name):
    model, prompt, words, n = started(name)

    def tensors():
        if name in OURS:
            return [t for layer in model.decoder.state for t in layer]
        return [t for layer in model.cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]

    with torch.inference_mode():
        model.prefill(prompt, n, n)
        real = [(t.shape, t.dtype, t.stride()) for t in tensors()]
        logits = model.step(words[:, 0]).shape
        at = None if name in OURS else (model.position.item(), int(tensors()[2]))
        model.allocate(2, n + 16)
        model.fill(n)
        assert [(t.shape, t.dtype, t.stride()) for t in tensors()] == real
        if name in OURS:
            assert all(t.float().std() > 0.5 for t in tensors())
        else:
            assert tensors()[0][:, :, :n].std() > 0.5 and not tensors()[0][:, :, n:].any()
        assert model.step(words[:, 0]).shape == logits
        assert at is None or at == (model.position.item(), int(tensors()[2])) == (n + 1, n + 1)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_it_measures_writes_and_resumes(phase, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    out = tmp_path / "new" / "a.json"
    command = [phase, *SMALL, "--batch", "2", "--out", str(out)] + (["--steps", "3"] if phase == "decode" else [])
    if phase == "decode":  # a process takes seconds, and does the same in both
        monkeypatch.setattr(measure, "peak_memory", lambda point: 1)
        monkeypatch.setattr(measure, "measure_rates", lambda threads: RATES)
    cli.main(command)
    first = json.loads(out.read_text())
    ours, theirs = first["rows"]
    assert (ours["model"], theirs["model"]) == ("ml-mamba", "mobilevlm-v2")
    assert all(len(row["time"]["seconds"]) == 3 and row["peak_memory"] > 0 for row in first["rows"])
    assert ours["tokens"] == 72 and theirs["tokens"] == (72 if phase == "decode" else 72 - 64 + 16)
    assert ours["state_bytes"] == SPECS["small"]["ml-mamba"].state_bytes(0, torch.float32)
    rate = 2 / ours["time"]["median"]
    assert phase == "prefill" or ours["tokens_s"] == pytest.approx(rate) and ours["bandwidth_share"] > 0
    assert phase == "decode" or 0 < ours["encode"]["median"] < ours["time"]["median"]
    with out.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["median"]) for line in lines] == [row["time"]["median"] for row in first["rows"]]
    assert int(lines[0]["lm_parameters"]) == first["models"]["ml-mamba"]["parameters"]["language"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = out.with_suffix(".html").read_text()
    assert "ml-mamba" in page and "data:image/png" in page and "<script" not in page
    assert "mobilevlm-v2" in capsys.readouterr().out

    turns = []
    once = measure.run_once
    monkeypatch.setattr(measure, "run_once", lambda model, point: turns.append(point.model) or once(model, point))
    monkeypatch.setattr(measure, "peak_memory", lambda point: 1)
    monkeypatch.setattr(report, "plot", lambda result: b"")
    command[command.index("mobilevlm-v2") + 1 : command.index("mobilevlm-v2") + 1] = ["vl-mamba"]
    cli.main(command)
    assert turns == ["vl-mamba"] * 3
    again = {row["model"]: row for row in json.loads(out.read_text())["rows"]}
    assert (again["ml-mamba"], again["mobilevlm-v2"]) == (ours, theirs) and "time" in again["vl-mamba"]


def test_a_plot_names_its_lines_beside_them(monkeypatch):
    pytest.importorskip("matplotlib")
    figures, png = [], report.png
    monkeypatch.setattr(report, "png", lambda figure: figures.append(figure) or png(figure))
    time = {"median": 0.02, "low": 0.01, "high": 0.03}
    rows = [
        {"model": m, "batch": b, "context": c, "time": time, "peak_memory": b * (i + 1) * c * 2**20}
        for i, m in enumerate((*OURS, *TRANSFORMERS))
        for b in (1, 4)
        for c in (256, 1024)
    ]
    result = {"phase": "decode", "size": "small", "dtype": "fp32", "device": "cpu"}
    report.plot({**result, "rows": rows, "checks": {"tinyllava": {"is_right": False}}})
    axes = figures[0].axes
    assert [axis.get_title(loc="left")[:7] for axis in axes] == ["batch 1", "peak ab", "batch 4", "peak ab"]
    for axis in axes[1::2]:
        assert {text.get_text() for text in axis.texts} == {*OURS, *TRANSFORMERS} and axis.get_legend() is None
        heights = sorted(text.get_position()[1] for text in axis.texts)
        assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.05  # none over another
        wrong = [text.get_color() for text in axis.texts if text.get_text() == "tinyllava"]
        assert wrong == [plots.WRONG]
    assert list(axes[0].lines[0].get_ydata()) == [20, 20]


def test_quantized_weights_are_measured_beside_the_others(tmp_path, quick, capsys):
    pytest.importorskip("torchao")
    out = tmp_path / "a.json"
    command = ["decode", "--models", "ml-mamba", "--context", "9", "--batch", "1", "--steps", "3"]
    cli.main([*command, "--quantize", "int8", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [row["model"] for row in result["rows"]] == ["ml-mamba", "ml-mamba int8"]
    full, lean = result["models"].values()
    assert full["parameters"] == lean["parameters"]
    assert lean["bytes"]["language"] < 0.3 * full["bytes"]["language"]
    for row, model in zip(result["rows"], (full, lean), strict=True):
        assert row["bandwidth_share"] == pytest.approx(model["bytes"]["language"] / row["fastest"] / 1e10)
    assert 0 < result["checks"]["ml-mamba int8"]["error"] and "ml-mamba int8" in capsys.readouterr().out


def test_another_measurement_is_not_overwritten(tmp_path, quick):
    out = tmp_path / "a.json"
    cli.main(["decode", "--models", "ml-mamba", "--context", "9", "--batch", "1", "--steps", "3", "--out", str(out)])
    before = out.read_text()
    with pytest.raises(SystemExit, match="was measured with steps 3, not 6"):
        cli.main(["decode", "--models", "ml-mamba", "--context", "9", "--steps", "6", "--out", str(out)])
    with pytest.raises(SystemExit, match="was measured with phase decode, not prefill"):
        cli.main(["prefill", "--models", "ml-mamba", "--out", str(out)])
    assert out.read_text() == before
    out.write_text('{"rows": 1}')
    with pytest.raises(SystemExit, match="is no file of ssm-bench decode"):
        cli.main(["decode", "--models", "ml-mamba", "--out", str(out)])


def test_an_interrupt_saves_the_rows_measured_so_far(tmp_path, quick, monkeypatch):
    out, once = tmp_path / "a.json", measure.run_once

    def interrupted(model, point):
        if point.context == 16:
            raise KeyboardInterrupt
        return once(model, point)

    monkeypatch.setattr(measure, "run_once", interrupted)
    command = ["decode", "--models", "ml-mamba", "--batch", "1", "--context", "8", "16", "--steps", "3"]
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--out", str(out)])
    assert end.value.code == 130
    assert [row["context"] for row in json.loads(out.read_text())["rows"]] == [8]


def test_without_transformers_ours_are_measured_and_the_others_say_what_to_install(tmp_path, quick, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "transformers" else found(n, *a))
    cli.main(["prefill", *SMALL, "--out", str(tmp_path / "a.json")])
    ours, theirs = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert "time" in ours and theirs["missing"] == "transformers is not installed: pip install transformers"


def test_what_would_take_too_long_or_too_much_memory_is_a_row_that_says_so(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(measure, "run_once", lambda *a: pytest.fail("it was run"))
    command = ["prefill", "--models", "vl-mamba", "--context", "131072", "--out", str(tmp_path / "a.json")]
    cli.main([*command, "--budget", "0.01"])
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["missing"].startswith("skipped: predicted") and "budget of 0.01 s" in row["missing"]
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    cli.main(command)
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["missing"].startswith("does not fit: needs about") and row["missing"] in capsys.readouterr().out


def test_out_of_memory_is_a_row(tmp_path, quick, monkeypatch):
    def full(*a):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(measure, "run_once", full)
    command = ["decode", "--models", "ml-mamba", "--context", "8", "--batch", "1", "--out", str(tmp_path / "a.json")]
    cli.main(command)
    assert [r["missing"] for r in json.loads((tmp_path / "a.json").read_text())["rows"]] == ["out of memory"]


def test_every_error_for_want_of_memory_is_known():
    with pytest.raises(RuntimeError) as of_the_allocator:
        torch.empty(10**15)
    for error in (of_the_allocator.value, MemoryError("stopped by the kernel"), torch.OutOfMemoryError("CUDA")):
        assert session.out_of_memory(error) == "out of memory"


def test_another_failure_is_raised():
    with pytest.raises(RuntimeError, match="out of memory of the past"):
        session.out_of_memory(RuntimeError("out of memory of the past"))


def test_a_transformer_s_prompt_runs_in_chunks_where_it_does_not_fit_unsplit(monkeypatch):
    point = measure.Point("prefill", "published", "tinyllava", 1, 131072, "bf16", "cpu", 0, 131072, 3_200_000_000)
    unsplit = dataclasses.replace(point, chunk=point.tokens).bytes_needed
    in_chunks = point.bytes_needed
    assert in_chunks < unsplit
    for free, chunk in ((unsplit, point.tokens), (in_chunks, PREFILL_CHUNK)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: int(free / measure.MEMORY_SHARE) + 2)
        assert point.fitted().chunk == chunk


def test_a_model_whose_steps_are_wrong_is_marked_and_so_is_the_exit_status(tmp_path, quick, monkeypatch, capsys):
    pytest.importorskip("transformers")
    step = TransformerModel.step
    monkeypatch.setattr(TransformerModel, "step", lambda self, tokens: step(self, tokens) * 1.001)
    out = tmp_path / "a.json"
    with pytest.raises(SystemExit, match="wrong: mobilevlm-v2; steps do not have"):
        cli.main(["decode", *SMALL, "--batch", "1", "--steps", "3", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [name for name, check in result["checks"].items() if not check["is_right"]] == ["mobilevlm-v2"]
    assert capsys.readouterr().out.count("WRONG") == 1
    assert "mobilevlm-v2 WRONG" in out.with_suffix(".html").read_text()


@pytest.mark.parametrize("factor", [1.0, 1.001, float("nan")])
def test_steps_that_differ_or_are_not_finite_are_wrong(factor, monkeypatch):
    model = build(SPECS["small"]["ml-mamba"], torch.float32, "cpu", 400)
    monkeypatch.setattr(model, "step", lambda tokens: MambaModel.step(model, tokens) * factor)
    point = measure.Point("decode", "small", "ml-mamba", 1, 8, "fp32", "cpu", 3, 400, 0)
    with torch.inference_mode():
        found, _, _ = measure.check(model, point)
    assert found["is_right"] == (factor == 1.0)


def test_bad_input_is_named():
    for arguments, message in (
        (["prefill", "--context", "64"], r"context must be at least 65 \(an image of 64 tokens, and a text\); got 64"),
        (["decode", "--batch", "0"], r"--batch\[0\] must be at least 1, got 0"),
        (["decode", "--steps", "2"], "steps must be at least 3, one a round; got 2"),
        (["decode", "--budget", "0"], "--budget must be positive, got 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(arguments)


def test_crossings_are_sentences():
    def row(model, context, seconds):
        return {"model": model, "batch": 1, "context": context, "time": {"median": seconds}}

    rows = [row("vl-mamba", c, 1.0) for c in (1000, 2000)]
    rows += [row("transformer-siglip", 1000, 0.5), row("transformer-siglip", 2000, 2.0)]
    (line,) = report.crossings({"phase": "decode", "rows": rows})
    assert line == "decode, batch 1: vl-mamba is faster than transformer-siglip at 2,000; slower at 1,000"
