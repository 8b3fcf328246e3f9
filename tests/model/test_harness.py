"""Evaluation by the field's harnesses: their own evaluators on small local tasks, against our own numbers."""

from __future__ import annotations

import json
import math
import re
import sys
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import processors

from tests.makers import VISION, language_config, save_images, sharpen
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import (
    VLM,
    GenerationConfig,
    MambaLM,
    Tokenizer,
    Turn,
    VLMConfig,
    collate,
)
from vlmamba.model.harness import generation_batches, generation_config, load, parse_batch_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WORDS = ["red", "green", "blue", "circle", "square", "a long, dark line"]
TOKENIZER = Tokenizer.train([f"What is it? {word}.\n" for word in WORDS] * 3, 300)


def sharpen_with_large_steps(lm: MambaLM) -> None:
    """Make answers differ, and every token count for much in them."""
    sharpen(lm)
    with torch.no_grad():
        for layer in lm.backbone.layers:
            layer.mixer.dt_proj.bias.add_(3)


def write_task(folder: Path, docs: list[dict], task: dict) -> None:
    """A task as both harnesses read it: a YAML file (JSON is YAML), and its documents as lines of JSON."""
    data = folder / f"{task['task']}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    local = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    text = json.dumps({"dataset_path": "json", "dataset_kwargs": local, "test_split": "test", **task}, indent=1)
    text = text.replace('"!function ', "!function ").replace('!"', "")
    (folder / f"{task['task']}.yaml").write_text(text)


def entry_point(group: str) -> EntryPoint:
    """The one of that group, by which a harness finds the model."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"][group].items()
    return EntryPoint(name, value, group)


# What both share.


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, GenerationConfig(99)),
        ({"until": "\n", "max_gen_toks": 3}, GenerationConfig(3, stop=("\n",))),
        ({"until": ["a", "", "b"], "max_new_tokens": 4.0, "max_tokens": 5}, GenerationConfig(4, stop=("a", "b"))),
        # MM-Vet's, and MMSearch's: the temperature is not to be used.
        ({"temperature": 0.2, "top_p": 1.0, "num_beams": 1, "do_sample": False}, GenerationConfig(99)),
        ({"temperature": 0, "top_p": 0, "do_sample": True}, GenerationConfig(99)),
        ({"do_sample": True, "top_k": 5}, GenerationConfig(99, temperature=1.0, top_k=5)),
        ({"temperature": 0.5, "top_p": None, "seed": 7}, GenerationConfig(99, temperature=0.5, seed=7)),
        ({"repetition_penalty": 1.5}, GenerationConfig(99, repetition_penalty=1.5)),
    ],
)
def test_generation_arguments(kwargs, expected):
    assert generation_config(kwargs, 99) == expected


@pytest.mark.parametrize("kwargs, named", [({"num_beams": 4}, "num_beams"), ({"min_p": 0.1}, "min_p")])
def test_generation_arguments_that_are_not_known(kwargs, named):
    with pytest.raises(ValueError, match=named):
        generation_config(kwargs, 99)


def test_batches_are_of_one_configuration_and_what_is_repeated_is_drawn_anew():
    greedy, drawn = {"temperature": 0}, {"temperature": 1.0}
    requests = [("p", drawn), ("q", greedy), ("p", drawn), ("q", greedy), ("r", greedy), ("q", drawn), ("p", drawn)]
    batches = [(c.temperature, c.seed, indices) for c, indices in generation_batches(requests, 5, 2)]
    assert batches == [(1.0, 0, [0, 5]), (0.0, 0, [1, 3]), (0.0, 0, [4]), (1.0, 1, [2]), (1.0, 2, [6])]


def test_batch_size():
    assert parse_batch_size("8") == parse_batch_size(8) == 8
    for size in ("auto", 0, -1, 1.5):
        with pytest.raises(ValueError, match="batch_size"):
            parse_batch_size(size)


# Language models in lm-eval.


@pytest.fixture(scope="module")
def lm() -> MambaLM:
    torch.manual_seed(0)
    model = MambaLM(language_config("mamba", 300), TOKENIZER).eval()
    sharpen_with_large_steps(model)
    return model


@pytest.fixture(scope="module")
def lm_folder(lm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    lm.save_pretrained(folder)
    return folder


@torch.no_grad()
def logprob(lm: MambaLM, ids: list[int], n: int) -> tuple[float, bool]:
    """Sum the log-likelihoods of the last `n` tokens by one forward, and tell whether each is the likeliest."""
    logits = lm(torch.tensor([ids])).logits[0, -n - 1 : -1].double().log_softmax(-1)
    answer = torch.tensor(ids[-n:])
    return logits.gather(1, answer[:, None]).sum().item(), bool((logits.argmax(-1) == answer).all())


@torch.no_grad()
def greedy(lm: MambaLM, ids: list[int], n: int) -> str:
    """The likeliest next tokens, each from a run of all before it."""
    new: list[int] = []
    while len(new) < n:
        new.append(int(lm(torch.tensor([ids + new])).logits[0, -1, : TOKENIZER.vocab_size].argmax()))
        if new[-1] == TOKENIZER.eos_id:
            break
    return TOKENIZER.decode(new)


QUESTIONS = [f"What {verb} it{end}" for verb in ("is", "was", "about") for end in ("?", " there?", ":")]


def evaluate_lm(model, folder: Path, task: str, **kwargs) -> tuple[dict, list[dict]]:
    """`lm-eval`'s results and samples of one task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import vlmamba.model.harness.lm_eval  # noqa: F401  (registers the model)

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=tasks, bootstrap_iters=0, **kwargs)
    return found["results"][task], sorted(found["samples"][task], key=lambda s: s["doc_id"])


def test_lm_eval_multiple_choice(lm, lm_folder, tmp_path):
    direct, docs = [], []
    for i, question in enumerate(QUESTIONS):
        prompt = TOKENIZER.encode(question)
        answers = [TOKENIZER.encode(f"{question} {word}")[len(prompt) :] for word in WORDS]
        direct.append([logprob(lm, prompt + answer, len(answer)) for answer in answers])
        best = max(range(len(WORDS)), key=lambda j: direct[-1][j][0])
        docs.append({"question": question, "choices": WORDS, "answer": best if i % 3 else (best + 1) % len(WORDS)})
    assert len({doc["answer"] for doc in docs}) > 1
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    task = {"task": "choose", "output_type": "multiple_choice", "doc_to_text": "{{question}}"}
    write_task(
        tmp_path, docs, {**task, "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": metrics}
    )
    results, samples = evaluate_lm(
        "vlmamba", tmp_path, "choose", model_args=f"pretrained={lm_folder},dtype=float32", batch_size=8, device="cpu"
    )
    by_length = 0
    for doc, sample, scores in zip(docs, samples, direct, strict=True):
        found = [response for (response,) in sample["resps"]]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in scores], abs=1e-4)
        assert [flag for _, flag in found] == [flag for _, flag in scores]
        by_length += max(range(len(WORDS)), key=lambda j: scores[j][0] / len(WORDS[j])) == doc["answer"]
    assert results["acc,none"] == pytest.approx(6 / 9)
    assert results["acc_norm,none"] == pytest.approx(by_length / 9)


def test_lm_eval_generate_until(lm, tmp_path):
    from vlmamba.model.harness.lm_eval import HarnessLM

    whole = [greedy(lm, TOKENIZER.encode(q), 12) for q in QUESTIONS]
    stop = next(text[4] for text in whole if len(text) > 4)
    answers = [text.split(stop)[0] for text in whole]
    assert any(stop in text for text in whole) and len(set(answers)) > 2
    right = [i % 3 > 0 for i in range(len(QUESTIONS))]
    docs = [
        {"question": question, "answer": answer if keep else "other"}
        for question, answer, keep in zip(QUESTIONS, answers, right, strict=True)
    ]
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    task = {
        "task": "write",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [stop], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [metric],
    }
    write_task(tmp_path, docs, task)
    results, samples = evaluate_lm(HarnessLM(lm, batch_size=4), tmp_path, "write")
    assert [sample["resps"] for sample in samples] == [[[answer]] for answer in answers]
    assert results["exact_match,none"] == pytest.approx(sum(right) / len(right))


def test_lm_eval_rolling_perplexity_is_of_the_full_document(lm, tmp_path):
    from vlmamba.model.harness.lm_eval import HarnessLM

    docs = [{"text": text} for text in ("red.", "", "a red circle, a green square.\n" * 250, "What is it?")]
    assert len(TOKENIZER.encode(docs[2]["text"])) > 2048  # beyond the harness's usual window
    write_task(
        tmp_path,
        docs,
        {
            "task": "read",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    )
    results, samples = evaluate_lm(HarnessLM(lm, batch_size=2), tmp_path, "read")
    ids = [TOKENIZER.encode(doc["text"]) for doc in docs]
    direct = [logprob(lm, [TOKENIZER.eos_id, *i], len(i))[0] if i else 0.0 for i in ids]
    assert [value for ((value,),) in (s["resps"] for s in samples)] == pytest.approx(direct, rel=1e-4)
    n_bytes = sum(len(doc["text"].encode()) for doc in docs)
    n_words = sum(len(re.split(r"\s+", doc["text"])) for doc in docs)
    assert results["bits_per_byte,none"] == pytest.approx(-sum(direct) / n_bytes / math.log(2), rel=1e-4)
    assert results["word_perplexity,none"] == pytest.approx(math.exp(-sum(direct) / n_words), rel=1e-3)


def test_lm_eval_contexts_that_are_empty(lm):
    from lm_eval.api.instance import Instance

    from vlmamba.model.harness.lm_eval import HarnessLM

    pairs = [("", "red"), ("  ", "red"), ("", "<|endoftext|> red")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    eos, red, spaced = [TOKENIZER.eos_id], TOKENIZER.encode("red"), TOKENIZER.encode("  red")
    last = TOKENIZER.encode(" red")
    direct = [logprob(lm, eos + ids, len(ids))[0] for ids in (red, spaced, last)]
    found = HarnessLM(lm).loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx(direct, abs=1e-4)


def test_lm_eval_reports_which_answers_are_the_likeliest(lm):
    from lm_eval.api.instance import Instance

    from vlmamba.model.harness.lm_eval import HarnessLM

    prompts = [prompt for prompt in QUESTIONS if greedy(lm, TOKENIZER.encode(prompt), 1).isascii()]
    pairs = [(prompt, answer) for prompt in prompts for answer in (greedy(lm, TOKENIZER.encode(prompt), 1), "~")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = HarnessLM(lm, batch_size=4).loglikelihood(requests, disable_tqdm=True)
    assert prompts and [flag for _, flag in found] == [True, False] * len(prompts)


def test_lm_eval_with_a_tokenizer_that_prepends_a_token(lm):
    from lm_eval.api.instance import Instance

    from vlmamba.model.harness.lm_eval import HarnessLM

    inner = tokenizers.Tokenizer.from_str(TOKENIZER.inner.to_str())
    inner.add_special_tokens(["<s>"])
    begin = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", begin)])
    harness = HarnessLM(lm)
    harness.tokenizer = Tokenizer(inner)
    question, answer = TOKENIZER.encode("It is"), TOKENIZER.encode(" blue")
    requests = [Instance("loglikelihood", {}, (text, " blue"), i) for i, text in enumerate(("It is", ""))]
    found = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    assert found == pytest.approx([logprob(lm, [begin, *before, *answer], len(answer))[0] for before in (question, [])])
    (value,) = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("It is",), 0)], disable_tqdm=True)
    assert value == pytest.approx(logprob(lm, [begin, *question], len(question))[0])
    args = ("It is", {"max_gen_toks": 5})
    assert harness.generate_until([Instance("generate_until", {}, args, 0)], disable_tqdm=True) == [
        greedy(lm, [begin, *question], 5)
    ]


def test_load(lm, lm_folder, tmp_path):
    assert load(MambaLM, lm, None, None, None) is lm
    assert load(MambaLM, str(lm_folder), None, "bfloat16", "cpu").lm_head.weight.dtype is torch.bfloat16
    assert load(MambaLM, str(lm_folder), None, None, None).lm_head.weight.dtype is torch.float32
    with pytest.raises(ValueError, match="pretrained is a model"):
        load(MambaLM, lm, None, "bfloat16", None)
    for dtype in ("int8", "nn", "auto"):
        with pytest.raises(ValueError, match="dtype"):
            load(MambaLM, str(lm_folder), None, dtype, "cpu")
    with pytest.raises(ValueError, match="tokenizer"):
        load(MambaLM, MambaLM(lm.config), None, None, None)


def test_lm_eval_keeps_what_it_has(lm):
    from lm_eval.api.instance import Instance

    from vlmamba.model.harness.lm_eval import HarnessLM

    class Hook:
        def __init__(self):
            self.kept = {}

        def add_partial(self, kind, args, result):
            self.kept[kind, args[0]] = result

    harness, hook = HarnessLM(lm, batch_size=2), Hook()
    harness.set_cache_hook(hook)
    args = {"loglikelihood": (" red",), "loglikelihood_rolling": (), "generate_until": ({"max_gen_toks": 3},)}
    texts = ["It is", "Is it", "Is"]
    for kind, more in args.items():
        requests = [Instance(kind, {}, (text, *more), i) for i, text in enumerate(texts)]
        found = getattr(harness, kind)(requests, disable_tqdm=True)
        assert [hook.kept[kind, text] for text in texts] == found


def test_lm_eval_finds_the_model():
    from lm_eval.api.registry import get_model

    from vlmamba.model.harness.lm_eval import HarnessLM

    assert get_model("vlmamba") is entry_point("lm_eval.models").load() is HarnessLM
    assert get_model("dummy").__name__ == "DummyLM"  # one of the harness's own is still there


def test_lm_eval_command_line(lm_folder, tmp_path, monkeypatch, capsys):
    from lm_eval.tasks import TaskManager

    from vlmamba.model.harness import lm_eval

    task = {"task": "command", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write_task(tmp_path, [{"text": "red."}], {**task, "metric_list": [{"metric": "bits_per_byte"}]})
    # The harness's own tasks take seconds to index.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    command = f"lm-eval run --model vlmamba --model_args pretrained={lm_folder} --tasks command --device cpu"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--include_path", str(tmp_path)])
    lm_eval.main()
    assert "bits_per_byte" in capsys.readouterr().out


# Vision-language models in lmms-eval.

COLORS = ["red", "green", "blue", "yellow", "purple"]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    torch.manual_seed(0)
    connector = ConnectorConfig("vss-l2", d_state=4)
    model = VLM(VLMConfig(language_config("mamba", 300), (VISION,), connector, template="qa"), TOKENIZER).eval()
    sharpen_with_large_steps(model.language_model)
    with torch.no_grad():
        model.connector.linear2.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def vlm_folder(vlm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    vlm.save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path) -> list[Path]:
    (tmp_path / "utils.py").write_text(
        "from PIL import Image\n"
        "def doc_to_visual(doc):\n"
        "    return [Image.open(path) for path in doc['images']]\n"
        "def doc_to_text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None,\n"
        "                previous_round_info=None):\n"
        "    if round_idx is None:\n"
        "        return doc['question']\n"
        "    info = (previous_round_info or 0) + 1\n"
        "    text = f'{previous_output[-1]} and {info}?'\n"
        "    return doc_to_visual(doc)[: round_idx % 2], text, round_idx == 3, previous_output, info\n"
        "def process_rounds(doc, results):\n"
        "    return {'acc': float(results[0] == doc['answer'])}\n"
    )
    return save_images(tmp_path, COLORS)


def evaluate_vlm(model, folder: Path, task: str, **kwargs) -> tuple[dict, list[dict]]:
    """`lmms-eval`'s results and samples of one task."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False, model_name="vlmamba")
    found = simple_evaluate(model, tasks=[task], task_manager=tasks, bootstrap_iters=0, **kwargs)
    return found["results"][task], sorted(found["samples"][task], key=lambda s: s["doc_id"])


def visual_task(name: str, output_type: str, **more) -> dict:
    # The evaluator's YAML has functions by a tag, which JSON has not.
    visual = {"doc_to_visual": "!function utils.doc_to_visual!", "doc_to_text": "{{question}}"}
    return {"task": name, "output_type": output_type, **visual, "doc_to_target": "answer", **more}


def metric_list(name: str) -> list[dict]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True}]


def test_lmms_eval_generate_until(vlm, vlm_folder, images, tmp_path):
    questions = [f"What is it{end}" for end in ("?", " there?", ":", "\n", " called?")]
    config = GenerationConfig(6, stop=("ASSISTANT:",))
    answers = [vlm.generate([q], [image], config)[0] for q, image in zip(questions, images, strict=True)]
    assert len({vlm.generate(questions[:1], [image], config)[0] for image in images}) > 1  # the image counts
    docs = [
        {"question": q, "images": [str(image)], "answer": a.strip() if i % 2 else "other"}
        for i, (q, image, a) in enumerate(zip(questions, images, answers, strict=True))
    ]
    docs.append({"question": "What is it?", "images": [], "answer": "other"})
    answers.append(vlm.generate(["What is it?"], [None], config)[0])
    kwargs = {"until": ["ASSISTANT:"], "max_new_tokens": 6, "temperature": 0.2, "num_beams": 1, "do_sample": False}
    task = visual_task("ask", "generate_until", generation_kwargs=kwargs, metric_list=metric_list("exact_match"))
    write_task(tmp_path, docs, task)
    results, samples = evaluate_vlm(
        "vlmamba", tmp_path, "ask", model_args=f"pretrained={vlm_folder},dtype=float32", batch_size=4, device="cpu"
    )
    assert [sample["resps"] for sample in samples] == [[[answer]] for answer in answers]
    assert results["exact_match,none"] == pytest.approx(2 / 6)


@torch.no_grad()
def test_lmms_eval_loglikelihood(vlm, images, tmp_path):
    pytest.importorskip("lmms_eval")
    from vlmamba.model.harness.lmms_eval import HarnessVLM

    docs, direct = [], []
    for i, (end, image) in enumerate(zip(("?", "?", " there?", ":", " called?"), images, strict=True)):
        question = f"What is it{end}"
        turns = [[Turn("user", question), Turn("assistant", word)] for word in WORDS[:4]]
        losses = [vlm(collate([vlm.prepare(t, image)])) for t in turns]
        direct.append([out.loss.item() * out.n_targets for out in losses])
        best = direct[-1].index(min(direct[-1]))
        answer = best if i % 2 else (best + 1) % 4
        docs.append({"question": question, "images": [str(image)], "choices": WORDS[:4], "answer": answer})
    more = {"doc_to_choice": "{{choices}}", "metric_list": metric_list("acc")}
    write_task(tmp_path, docs, visual_task("pick", "multiple_choice", **more))
    results, samples = evaluate_vlm(HarnessVLM(vlm, batch_size=8), tmp_path, "pick")
    for sample, losses in zip(samples, direct, strict=True):
        assert [value for value, _ in sample["filtered_resps"]] == pytest.approx(losses, rel=1e-4)
    assert results["acc,none"] == pytest.approx(2 / 5)


def test_lmms_eval_rounds(vlm, images, tmp_path):
    pytest.importorskip("lmms_eval")
    from vlmamba.model.harness.lmms_eval import HarnessVLM

    config = GenerationConfig(6)
    docs, expected = [], []
    for i, image in enumerate(images[:2]):
        answers = [vlm.generate(["What is it?"], [image], config)[0]]
        for n, seen in enumerate((image, None), 1):
            answers += vlm.generate([f"{answers[-1]} and {n}?"], [seen], config)
        expected.append(answers)
        docs.append({"question": "What is it?", "images": [str(image)], "answer": answers if i else []})
    assert expected[0][0] != expected[1][0]  # the image counts
    task = visual_task(
        "rounds",
        "generate_until_multi_round",
        generation_kwargs={"max_new_tokens": 6},
        metric_list=metric_list("acc"),
        process_results="!function utils.process_rounds!",
    )
    write_task(tmp_path, docs, {**task, "doc_to_text": "!function utils.doc_to_text!"})
    results, samples = evaluate_vlm(HarnessVLM(vlm), tmp_path, "rounds")
    assert [sample["filtered_resps"] for sample in samples] == [[answers] for answers in expected]
    assert results["acc,none"] == 0.5


def test_lmms_eval_places_several_images_and_refuses_others(vlm, images, tmp_path):
    pytest.importorskip("lmms_eval")
    from vlmamba.model.harness.lmms_eval import HarnessVLM

    shown, questions = images[:2], ["What are they?", "Is <image> as <image>?"]
    answers = vlm.generate(["<image><image>" + questions[0], questions[1]], [shown, shown], GenerationConfig(6))
    docs = [
        {"question": q, "images": [str(image) for image in shown], "answer": a}
        for q, a in zip(questions, answers, strict=True)
    ]
    kwargs = {"generation_kwargs": {"max_new_tokens": 6}, "metric_list": metric_list("exact_match")}
    write_task(tmp_path, docs, visual_task("several", "generate_until", **kwargs))
    assert evaluate_vlm(HarnessVLM(vlm), tmp_path, "several")[0]["exact_match,none"] == 1
    docs[0]["question"] = "<image> <image> <image>"
    write_task(tmp_path, docs, visual_task("fewer", "generate_until", **kwargs))
    with pytest.raises(ValueError, match=r"document 0 of fewer \(.*\) has 3 marks <image> for 2 images"):
        evaluate_vlm(HarnessVLM(vlm), tmp_path, "fewer")


def test_lmms_eval_finds_the_model():
    pytest.importorskip("lmms_eval")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from vlmamba.model.harness.lmms_eval import HarnessVLM

    registry = ModelRegistryV2()
    (manifest,) = registry._coerce_payload_to_manifests(entry_point("lmms_eval.models").load())
    registry.register_manifest(manifest)
    assert registry.get_model_class("vlmamba") is HarnessVLM
