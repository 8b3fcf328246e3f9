"""Speculative decoding: a draft model changes how many steps a text takes, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.makers import BLUE, RED, VISION, language_config, shape_tokenizer, sharpened_lm, sharpened_vlm
from vlmamba.connectors import ConnectorConfig
from vlmamba.model import VLM, GenerationConfig, LMConfig, MambaLM, Tokenizer, VLMConfig
from vlmamba.model.config import ImageProcessor, TilesConfig, VisionConfig, ViTConfig
from vlmamba.model.generation.generate import generate_texts
from vlmamba.model.generation.sampling import draw
from vlmamba.model.generation.speculative import DraftStats, accept

PROMPTS = ["what color is the shape?", "a red", "a blue triangle is"]
CONFIG = GenerationConfig(max_new_tokens=13, draft_tokens=3)


@pytest.fixture(scope="module")
def lm() -> MambaLM:
    return sharpened_lm(language_config("mamba2"), shape_tokenizer())


def near(lm: MambaLM, noise: float) -> MambaLM:
    """Return the model with noise on its weights, which proposes some tokens that are accepted."""
    draft = MambaLM(lm.config, lm.tokenizer).eval()
    draft.load_state_dict(lm.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(noise * p.std() * torch.randn(p.shape, generator=generator) if p.numel() > 1 else 0)
    return draft


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
def test_greedy_tokens_are_those_without_a_draft(lm, noise):
    stats = DraftStats()
    texts = lm.generate(PROMPTS, CONFIG, draft_model=near(lm, noise), draft_stats=stats)
    assert texts == lm.generate(PROMPTS, CONFIG)
    assert stats.steps and stats.proposed == 3 * stats.steps
    if noise == 0:  # a model that agrees with itself
        assert stats.accepted == stats.proposed and stats.tokens_per_step == 4
    else:
        assert 0 <= stats.accepted < stats.proposed


def test_a_draft_may_be_of_another_kind_and_size(lm):
    torch.manual_seed(0)
    draft = MambaLM(LMConfig(16, 1, 320, "mamba", d_state=4), lm.tokenizer).eval()
    stop = replace(CONFIG, stop=("e",))
    for config in (CONFIG, stop, replace(CONFIG, max_new_tokens=1), replace(CONFIG, max_new_tokens=0)):
        assert lm.generate(PROMPTS, config, draft_model=draft) == lm.generate(PROMPTS, config)
    assert "".join(lm.stream(PROMPTS[0], CONFIG, draft_model=draft)) == lm.generate(PROMPTS[:1], CONFIG)[0]


def test_a_sampled_text_does_not_depend_on_its_batch(lm):
    config = replace(CONFIG, temperature=1.5, top_k=20, seed=3)
    draft = near(lm, 0.05)
    together = lm.generate(PROMPTS, config, draft_model=draft)
    assert together == [lm.generate([prompt], config, draft_model=draft)[0] for prompt in PROMPTS]
    assert together != lm.generate(PROMPTS, replace(config, seed=4), draft_model=draft)


def test_a_vision_language_model_drafts_for_another():
    """The draft has encoders of its own, for images of another size: fewer tokens of the same images."""
    torch.manual_seed(0)
    vision = VisionConfig(ViTConfig(16, 8, 16, 1, 2, 32, feature_layer=-1), ImageProcessor(16))
    tokenizer = shape_tokenizer()
    vlm = sharpened_vlm(VLMConfig(language_config("mamba2"), (VISION,), ConnectorConfig("mlp"), "qa"), tokenizer)
    small = VLM(VLMConfig(language_config("mamba"), (vision,), ConnectorConfig("mlp"), "qa"), tokenizer).eval()
    assert small.image_tokens < vlm.image_tokens
    images = [RED, None, [RED, BLUE]]
    questions = ["what color?", "a red", "is <image> as <image>?"]
    want = vlm.generate(questions, images, CONFIG)
    assert want[0] != vlm.generate(questions[:1], [BLUE], CONFIG)[0]  # the image counts
    for draft in (vlm, small):
        stats = DraftStats()
        assert vlm.generate(questions, images, CONFIG, draft_model=draft, draft_stats=stats) == want
        assert (stats.accepted == stats.proposed > 0) == (draft is vlm)
    assert "".join(vlm.stream(questions[2], images[2], CONFIG, draft_model=small)) == want[2]
    assert vlm.generate([], [], CONFIG, draft_model=small) == []
    with pytest.raises(ValueError, match="images must not be preprocessed where there is a draft_model"):
        vlm.generate(questions[:1], [vlm.preprocess(RED)], CONFIG, draft_model=small)
    other = VLM(small.config, Tokenizer.train(["something else"] * 3, 300))
    with pytest.raises(ValueError, match="draft_model must have the tokenizer of the model"):
        vlm.generate(questions[:1], [RED], CONFIG, draft_model=other)


def test_equal_encoders_are_shared_and_run_once():
    tokenizer = shape_tokenizer()
    config = VLMConfig(language_config("mamba2"), (VISION,), ConnectorConfig("mlp"), "qa")
    vlm = sharpened_vlm(config, tokenizer)
    draft = VLM(replace(config, language=language_config("mamba")), tokenizer).eval()
    questions, images = ["is <image> as <image>?", "a red"], [[RED, BLUE], None]
    want = vlm.generate(questions, images, CONFIG)
    assert not vlm.share_encoders(draft) and draft.vision is not vlm.vision
    draft.vision.load_state_dict(vlm.vision.state_dict())
    before = DraftStats()
    assert vlm.generate(questions, images, CONFIG, draft_model=draft, draft_stats=before) == want
    assert not vlm.share_encoders(draft.double())  # equal values, but another dtype
    assert vlm.share_encoders(draft.float()) and draft.vision is vlm.vision
    runs, stats = [], DraftStats()
    vlm.vision.register_forward_hook(lambda *_: runs.append(1))
    assert vlm.generate(questions, images, CONFIG, draft_model=draft, draft_stats=stats) == want
    assert len(runs) == 1 and stats == before
    # Other views of an image are encoded by the same encoders.
    config = replace(config, tiles=TilesConfig(((1, 2),)))
    tiled = VLM(config, tokenizer).eval()
    tiled.vision.load_state_dict(vlm.vision.state_dict())
    assert vlm.share_encoders(tiled)
    assert vlm.generate(["what color?"], [RED], CONFIG, draft_model=tiled) == vlm.generate(
        ["what color?"], [RED], CONFIG
    )
    assert len(runs) == 4


def test_steps_of_both_models_are_fused(lm, monkeypatch):
    pytest.importorskip("numba")
    calls = []
    fuse = MambaLM.fuse_step

    def counted(self, state, tokens=1):
        step = fuse(self, state, tokens)
        return lambda embeds: calls.append((tokens, len(embeds) // tokens)) or step(embeds)

    monkeypatch.setattr(MambaLM, "fuse_step", counted)
    want, stats = lm.generate(PROMPTS, CONFIG), DraftStats()
    calls.clear()
    draft = near(lm, 1.0)
    assert lm.generate(PROMPTS, CONFIG, draft_model=draft, draft_stats=stats) == want
    # A step of the model verifies four tokens; the draft's are one a proposal, and one after the last if it is needed.
    rounds = [rows for tokens, rows in calls if tokens == 4]
    assert stats.accepted < stats.proposed and sum(rounds) == stats.steps and rounds[0] == 3
    assert 3 * len(rounds) <= sum(tokens == 1 for tokens, _ in calls) < 4 * len(rounds)
    # Where nothing is fused, the same proposals are made.
    plain = DraftStats()
    monkeypatch.setattr(MambaLM, "obstacle_to_fusing", lambda self: "a test")
    assert lm.generate(PROMPTS, CONFIG, draft_model=draft, draft_stats=plain) == want
    assert plain == stats and sum(tokens == 4 for tokens, _ in calls) == len(rounds)


def test_weights_that_move_in_a_generation_are_followed(lm):
    pytest.importorskip("numba")
    model = near(lm, 0.0)
    steps = model.stream(PROMPTS[0], CONFIG, draft_model=near(lm, 0.05))
    text = next(steps)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert text + "".join(steps) == lm.generate(PROMPTS[:1], CONFIG)[0]


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = counts.sum() * p
    return ((counts - expected).square() / expected).sum().item()


def test_accepted_tokens_have_the_distribution_of_the_model():
    """The first two tokens of a step with two proposals, 200,000 times: 15 degrees of freedom."""
    vocab, n = 4, 200_000
    generator = torch.Generator().manual_seed(0)
    first, q_first = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.3, 0.3, 0.3])
    second, q_second = torch.rand(2, vocab, vocab, generator=generator).softmax(-1)  # after each first token
    third = torch.full((vocab,), 1 / vocab)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator)

    one = draw(q_first.expand(n, -1), uniform())
    two = draw(q_second[one], uniform())
    p = torch.stack([first.expand(n, -1), second[one], third.expand(n, -1)], 1)
    q = torch.stack([q_first.expand(n, -1), q_second[one]], 1)
    n_accepted, own = accept(p, q, torch.stack([one, two], 1), uniform(2), uniform())
    tokens = torch.where(n_accepted == 0, own, one)
    counts = torch.bincount(tokens, minlength=vocab).float()
    assert counts[3] == 0 and chi_square(counts[:3], first[:3]) < 13.8  # p = 0.001 at 2 degrees of freedom
    # The token after an accepted first one.
    reached = n_accepted >= 1
    following = torch.where(n_accepted == 1, own, two)[reached]
    for token in range(3):
        counts = torch.bincount(following[one[reached] == token], minlength=vocab).float()
        assert chi_square(counts, second[token]) < 16.3  # 3 degrees of freedom


@pytest.mark.nightly
@torch.no_grad()
def test_texts_with_a_draft_are_distributed_as_those_without():
    """Three tokens, of which a draft proposes two, over 400 seeds: against the probabilities of the model."""
    tokenizer = Tokenizer.train(["ab"], 320)
    torch.manual_seed(1)
    config = LMConfig(8, 1, tokenizer.vocab_size, "mamba", d_state=4)
    lm = sharpened_lm(config, tokenizer, embedding=5)
    draft, ids = near(lm, 0.1), torch.tensor([tokenizer.encode("a")])

    def best(ids: torch.Tensor) -> dict[int, float]:
        values, tokens = lm(ids).logits[0, -1, : tokenizer.vocab_size].topk(2)
        return dict(zip(tokens.tolist(), (values / 3).softmax(0).tolist(), strict=True))

    probabilities = {}
    for a, p_a in best(ids).items():
        for b, p_b in best(torch.cat([ids, torch.tensor([[a]])], 1)).items():
            for c, p_c in best(torch.cat([ids, torch.tensor([[a, b]])], 1)).items():
                probabilities[a, b, c] = p_a * p_b * p_c
    counts = dict.fromkeys(probabilities, 0)
    options = GenerationConfig(max_new_tokens=3, temperature=3.0, top_k=2, draft_tokens=2)
    stats = DraftStats()
    for seed in range(400):
        *_, (completion,) = generate_texts(lm, ["a"], replace(options, seed=seed), draft, stats)
        counts[tuple(completion.ids)] += 1
    assert 0.1 < stats.acceptance < 0.9
    expected = torch.tensor([*probabilities.values()])
    assert expected.min() * 400 > 5  # so that chi-square holds
    assert chi_square(torch.tensor([*counts.values()]).float(), expected) < 24.3  # p = 0.001, 7 degrees of freedom


def test_models_that_cannot_work_together_are_refused(lm):
    other = MambaLM(lm.config, Tokenizer.train(["something else"] * 3, 300))
    with pytest.raises(ValueError, match="draft_model must have the tokenizer of the model"):
        lm.generate(PROMPTS, CONFIG, draft_model=other)
    with pytest.raises(ValueError, match="tokenizer"):
        lm.generate(PROMPTS, CONFIG, draft_model=MambaLM(lm.config))
    with pytest.raises(ValueError, match="repetition_penalty must be 1 with a draft_model, got 2"):
        lm.generate(PROMPTS, replace(CONFIG, repetition_penalty=2.0), draft_model=lm)
    small = MambaLM(LMConfig(16, 1, 270, "mamba", d_state=4), lm.tokenizer)
    with pytest.raises(ValueError, match="sequence 0 has token .*, but the draft model's vocabulary has 270 tokens"):
        lm.generate(PROMPTS, CONFIG, draft_model=small)
