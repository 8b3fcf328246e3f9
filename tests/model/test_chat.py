"""A conversation that goes on from its state gives the answers of one that is run again."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch

from tests.makers import BLUE, LAYERS, RED, VISION, language_config, shape_tokenizer, sharpened_lm, sharpened_vlm
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import GenerationConfig, Turn, VLMConfig
from vlmamba.model.chat import Conversation
from vlmamba.model.prompt import get_template

TOKENIZER = shape_tokenizer()
QUESTIONS = ["what color?", "and the shape", "tell me more, please", "a"]


@pytest.fixture(params=[("mamba", "qa"), ("mamba2", "zephyr"), ("mamba", "vicuna")], ids=str)
def vlm(request):
    layer, template = request.param
    config = VLMConfig(language_config(layer), (VISION,), ConnectorConfig("mlp"), template=template)
    return sharpened_vlm(config, TOKENIZER)


def without_marks(turns):
    """The turns as they were asked before their images were marked."""
    return [replace(turn, text=turn.text.removeprefix("<image>\n")) for turn in turns]


def tokens_run(lm):
    """The lengths of what the language model is given, as they come."""
    lengths = []

    def watch(module, args, kwargs):
        lengths.append((kwargs.get("inputs_embeds") if not args else args[0]).shape[1])

    lm.register_forward_pre_hook(watch, with_kwargs=True)
    return lengths


@pytest.mark.parametrize(
    "config",
    [GenerationConfig(10), GenerationConfig(10, temperature=1.0, top_k=50, repetition_penalty=1.3, seed=2)],
    ids=["greedy", "sampled"],
)
def test_answers_are_those_of_the_conversation_run_again(vlm, config):
    conversation, turns = Conversation(vlm, RED, config), []
    for i, question in enumerate(QUESTIONS):
        got = "".join(conversation.ask(question))
        turns.append(Turn("user", question))
        (want,) = vlm.generate([turns], [RED], replace(config, seed=config.seed + i))
        assert got == want
        turns.append(Turn("assistant", got))
    assert without_marks(conversation.turns) == turns


def test_a_repeated_question_is_sampled_anew_and_a_seeded_conversation_repeats(vlm):
    config = GenerationConfig(10, temperature=5.0, seed=3)

    def answers():
        conversation = Conversation(vlm, RED, config, history=False)
        drawn = ["".join(conversation.ask("what color?")) for _ in range(3)]
        conversation.reset(RED)
        return [*drawn, "".join(conversation.ask("what color?"))]

    first = answers()
    assert len(set(first)) == 4
    assert answers() == first


@pytest.mark.parametrize("place", ["encoder", "prompt", "answer"])
def test_a_turn_in_which_memory_runs_out_leaves_the_conversation(vlm, place):
    """Wherever it fails, the answers after it are those of a conversation without the turn, or with what was said."""
    config = GenerationConfig(6)
    conversation = Conversation(vlm, RED, config)
    "".join(conversation.ask(QUESTIONS[0]))
    if place == "encoder":
        conversation.reset(BLUE)
    turns = list(conversation.turns)
    module = vlm.vision if place == "encoder" else vlm.language_model.backbone.layers[1]
    calls = itertools.count()

    def fail(module, args):
        if next(calls) == (3 if place == "answer" else 0):
            raise torch.OutOfMemoryError("out of memory")

    hook = module.register_forward_pre_hook(fail)
    said = []
    with pytest.raises(torch.OutOfMemoryError):
        said.extend(conversation.ask(QUESTIONS[1]))
    hook.remove()
    if place == "answer":
        turns += [Turn("user", QUESTIONS[1]), Turn("assistant", "".join(said))]
    assert conversation.turns == turns
    got = "".join(conversation.ask(QUESTIONS[2]))
    image = BLUE if place == "encoder" else RED
    assert got == vlm.generate([[*turns, Turn("user", QUESTIONS[2])]], [image], config)[0]


def test_only_what_is_new_is_run(vlm, monkeypatch):
    conversation = Conversation(vlm, RED, GenerationConfig(4))
    lengths = tokens_run(vlm.language_model)
    encoded = []
    vlm.vision.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0][0])))
    before = 0
    for question in QUESTIONS:
        list(conversation.ask(question))
        ids, _ = vlm.template.encode(TOKENIZER, conversation.turns[:-1], [vlm.image_tokens])
        assert sum(lengths) <= len(ids) - before + 3 and conversation.turn_stats.prompt_tokens == lengths[0]
        before = len(ids)
        lengths.clear()
    assert encoded == [1]


@contextlib.contextmanager
def made_to_say(vlm, text):
    """The model's next answers are this, in the tokens that the answer has in a prompt."""
    tokens, head = itertools.cycle(vlm.template.encode_answer(TOKENIZER, text)), vlm.language_model.lm_head

    def forced(module, args, logits):
        if logits.numel():
            logits[..., next(tokens)] = 1e4

    hook = head.register_forward_hook(forced)
    yield
    hook.remove()


def test_an_answer_that_ends_by_itself_is_not_run_again(vlm):
    conversation = Conversation(vlm, None, GenerationConfig(6))
    with made_to_say(vlm, "red"):
        assert "".join(conversation.ask("what color?")).strip() == "red"
        assert "".join(conversation.ask("sure?")).strip() == "red"
    # The end-of-text token was chosen and not run, so it comes before the new turn.
    assert conversation.turn_stats.prompt_tokens == 1 + len(TOKENIZER.encode(vlm.template.user("sure?", False)))


def test_an_interrupted_answer_stays_in_the_conversation_as_far_as_it_got(vlm):
    config = GenerationConfig(10)
    conversation = Conversation(vlm, BLUE, config)
    given = ""
    with contextlib.closing(conversation.ask("what color?")) as stream:
        for text in stream:
            given += text
            if len(given) > 2:
                break
    turns = [Turn("user", "what color?"), Turn("assistant", given)]
    assert without_marks(conversation.turns) == turns
    turns.append(Turn("user", "and now?"))
    assert "".join(conversation.ask("and now?")) == vlm.generate([turns], [BLUE], config)[0]


@pytest.mark.parametrize("steps", [0, 2], ids=["in the question", "in the answer"])
def test_a_step_that_is_interrupted_leaves_no_half_state(vlm, steps):
    """Ctrl-C comes between two layers: the state of one has moved on, that of the other has not."""
    config = GenerationConfig(10)
    conversation = Conversation(vlm, None, config)
    with made_to_say(vlm, "red"):
        list(conversation.ask("what color?"))
    turns, calls = conversation.turns, []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) > steps:
            raise KeyboardInterrupt

    hook = vlm.language_model.backbone.layers[1].mixer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.ask("and"))
    hook.remove()
    # A question that was not read to its end has not been asked.
    assert conversation.turns[:2] == turns and len(conversation.turns) == (4 if steps else 2)
    turns = [*conversation.turns, Turn("user", "go on")]
    assert "".join(conversation.ask("go on")) == vlm.generate([turns], [None], config)[0]


def test_images_join_the_conversation_where_they_are_shown(vlm):
    """Each is encoded once in a conversation, and the answers are those of the whole conversation run again."""
    config = GenerationConfig(8)
    conversation, encoded = Conversation(vlm, config=config), []
    vlm.vision.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0][0])))
    turns, images = [], []
    for shown, question in [
        ([], "what color?"), ([RED], "and here?"), ([BLUE, RED], "a <image> or a <image>?"), ([], "sure?"),
    ]:  # fmt: skip
        for image in shown:
            conversation.add(image)
        images += shown
        encoded.clear()
        got = "".join(conversation.ask(question))
        # RED returns in the third turn, and is not encoded again.
        assert encoded == ([1] if shown else [])
        marks = "" if "<image>" in question else "<image>\n" * len(shown)
        turns.append(Turn("user", marks + question))
        assert got == vlm.generate([turns], [images], config)[0]
        turns.append(Turn("assistant", got))
    assert conversation.turns == turns
    conversation.add(BLUE)
    with pytest.raises(ValueError, match=r"got 5 marks \(1 in turn 2, 2 in turn 4, 2 in turn 8\) for 4 images"):
        list(conversation.ask("<image> <image>"))
    assert conversation.turns == turns


def test_reset_forgets_all_but_a_new_image(vlm):
    config = GenerationConfig(10)
    conversation = Conversation(vlm, RED, config)
    list(conversation.ask("what color?"))
    conversation.reset(BLUE)
    assert conversation.turns == []
    assert "".join(conversation.ask("what color?")) == vlm.generate(["what color?"], [BLUE], config)[0]
    with pytest.raises(FileNotFoundError, match=r"no image at nowhere.png"):
        conversation.reset("nowhere.png")
    assert len(conversation.images) == 1 and len(conversation.turns) == 2


def test_without_history_each_question_is_answered_alone(vlm):
    config = GenerationConfig(10)
    conversation = Conversation(vlm, RED, config, history=False)
    for question in QUESTIONS[:3]:
        assert "".join(conversation.ask(question)) == vlm.generate([question], [RED], config)[0]


def test_the_state_has_one_size(vlm):
    conversation = Conversation(vlm, RED, GenerationConfig(5))
    size = conversation.state_bytes
    for question in QUESTIONS:
        list(conversation.ask(question))
        assert conversation.state_bytes == size
    stats = conversation.turn_stats
    assert stats.tokens <= 5 and stats.prompt_seconds > 0
    assert stats.tokens == 1 or stats.tokens_per_second > 0


@pytest.mark.parametrize("layer", LAYERS)
def test_language_models_continue_text_or_answer_by_a_template(layer):
    lm = sharpened_lm(language_config(layer))
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        Conversation(lm)
    lm.tokenizer = TOKENIZER
    config = GenerationConfig(8)
    plain = Conversation(lm, config=config)
    for text in ("a red", "", "a blue"):
        assert "".join(plain.ask(text)) == lm.generate([text], config)[0]
    zephyr, turns = Conversation(lm, config=config, template=get_template("zephyr")), []
    for question in QUESTIONS:
        turns.append(Turn("user", question))
        ids, _ = get_template("zephyr").encode(TOKENIZER, turns)
        prompt = TOKENIZER.inner.decode(ids, skip_special_tokens=False)
        assert TOKENIZER.encode(prompt) == ids
        got = "".join(zephyr.ask(question))
        assert got == lm.generate([prompt], config)[0]
        turns.append(Turn("assistant", got))
    with pytest.raises(ValueError, match="which sees no image"):
        Conversation(lm, RED)
