"""Generation: prompts in chunks, decoding on memory that stays in place, ended sequences, text in and text out."""

from __future__ import annotations

import json
import logging
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssm_kernels import use_backend
from ssm_kernels._core.dispatch import HAS_NUMBA
from ssm_kernels.testing import Target, fake_target
from tests.makers import random_prompts, sharpened_lm
from vlmamba.model import GenerationConfig, LMConfig, MambaLM, Tokenizer
from vlmamba.model.generation import cuda_graph, decoding
from vlmamba.model.generation.decoding import Decoder, state_bytes
from vlmamba.model.generation.generate import Completion, generate_packed, generate_texts, generate_tokens
from vlmamba.model.generation.prefill import packed_tokens, prefill, prefill_chunks
from vlmamba.model.generation.sampling import SequenceSampling, choose_tokens
from vlmamba.model.score import score

TOKENIZER = Tokenizer.train(["once upon a time there was a state", "and it did not grow"] * 5, 300)
CONFIGS = {
    "mamba": LMConfig(32, 2, 300, "mamba", d_state=4),
    "mamba2": LMConfig(32, 2, 300, "mamba2", d_state=8, headdim=16, chunk_size=8),
}
LENGTHS = (5, 1, 23, 64, 2, 17)
PROMPTS = random_prompts(LENGTHS)


@pytest.fixture(params=CONFIGS)
def lm(request):
    return sharpened_lm(CONFIGS[request.param], TOKENIZER, embedding=30, out_proj=10)


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("size", [1, 2, 7, 24, 112, 200])
def test_prefill_chunks_cover_the_pack_and_name_its_sequences(size):
    owner = [s for s, n in enumerate(LENGTHS) for _ in range(n)]
    end_places = (bounds(LENGTHS)[1:] - 1).tolist()
    at, ends = 0, []
    for chunk in prefill_chunks(bounds(LENGTHS), size):
        assert chunk.start == at and chunk.start < chunk.end <= chunk.start + size
        inside = owner[chunk.start : chunk.end]
        rows = range(len(LENGTHS))[chunk.rows]
        assert list(rows) == sorted(set(inside))
        assert chunk.cu_seqlens.diff().tolist() == [inside.count(r) for r in rows]
        ends += [chunk.start + e for e in chunk.last_positions]
        at = chunk.end
    assert at == sum(LENGTHS)
    assert ends == end_places


def test_an_empty_prompt_is_named():
    with pytest.raises(ValueError, match="prompt 1 has none"):
        list(prefill_chunks(bounds((3, 0, 2)), 4))


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 8, 30, 111])
def test_a_prompt_in_prefill_chunks_is_a_prompt(lm, size):
    embeds, cu_seqlens = packed_tokens(lm, PROMPTS)
    whole, cut = lm.new_state(len(PROMPTS)), lm.new_state(len(PROMPTS))
    want = prefill(lm, embeds, cu_seqlens, whole, 10_000)
    got = prefill(lm, embeds, cu_seqlens, cut, size)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(cut, whole, strict=True):
        torch.testing.assert_close(a.conv, b.conv, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.ssm, b.ssm, rtol=1e-4, atol=1e-5)
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(want[i], lm(torch.tensor([prompt])).logits[0, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_in_bfloat16_a_prompt_in_prefill_chunks_agrees_to_rounding(lm):
    lm = lm.bfloat16()
    embeds, cu_seqlens = packed_tokens(lm, PROMPTS)
    whole, cut = lm.new_state(len(PROMPTS)), lm.new_state(len(PROMPTS))
    want = prefill(lm, embeds, cu_seqlens, whole, 10_000)
    got = prefill(lm, embeds, cu_seqlens, cut, 7)
    assert (got - want).norm() < 0.02 * want.norm()
    assert cut[0].ssm.dtype == torch.float32


def highest_memory(function):
    """Bytes by which a call raises the resident memory of the process."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("resident memory is read from /proc")

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

    clear.write_text("5")  # sets the peak back to what is resident now
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prompt_of_131072_tokens_takes_the_memory_of_a_prefill_chunk(kind):
    """All at once, one activation of the inner width would be 32 MiB, and there are several of them."""
    lm = MambaLM(LMConfig(32, 1, 300, kind, d_state=4, headdim=16)).eval()
    length = 131_072
    ids = torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(0))
    cu_seqlens, asked, found = torch.tensor([0, length]), [], []

    def embeds(begin, end):
        asked.append(end - begin)
        return lm.embed(ids[begin:end]).unsqueeze(0)

    def run():
        config = GenerationConfig(2, prefill_chunk=2048)
        found.extend(t for (t,), _ in generate_tokens(lm, embeds, cu_seqlens, [[]], config, 300))

    Decoder(lm, 1)(torch.tensor([1]))  # compiles the step, which takes memory once
    assert highest_memory(run) < 24 * 2**20
    assert max(asked) == 2048 and sum(asked) == length
    state = lm.new_state(1)
    for part in ids.split(30_000):
        logits = lm(part[None], state=state, logits_at=torch.tensor([len(part) - 1])).logits[0, -1]
    assert found[0] == int(logits.argmax())


def test_the_state_has_one_size_whatever_the_length(lm):
    config = lm.config
    inner = config.expand * config.d_model
    channels = inner + (2 * config.d_state if config.layer == "mamba2" else 0)
    want = config.n_layer * 4 * (3 * channels + inner * config.d_state)
    for length in (1, 10, 1000):
        decoder = Decoder(lm, 1)
        embeds, cu_seqlens = packed_tokens(lm, [[7] * length])
        list(generate_tokens(lm, embeds, cu_seqlens, [[]], GenerationConfig(3), 300, decoder=decoder))
        assert state_bytes(decoder.state) == want


SAMPLED = GenerationConfig(20, temperature=1.5, top_k=50, repetition_penalty=1.1, seed=3)


ENDS = (3, 20, 5, 1, 9, 20)


def tokens_until_the_ends(lm, config, prompts=PROMPTS):
    """The tokens of sequences that are finished after `ENDS` of them."""
    finished, got = [False] * len(prompts), [[] for _ in prompts]
    for tokens, tensor in generate_tokens(lm, *packed_tokens(lm, prompts), prompts, config, 300, finished=finished):
        assert tensor.tolist() == tokens
        for i, token in enumerate(tokens):
            if not finished[i]:
                got[i].append(token)
                finished[i] = len(got[i]) == ENDS[i]
    return got


@pytest.mark.parametrize("config", [GenerationConfig(20), SAMPLED], ids=["greedy", "sampled"])
def test_sequences_that_have_ended_are_left_out_and_change_nothing(lm, config):
    alone = []
    for prompt, end in zip(PROMPTS, ENDS, strict=True):
        steps = generate_tokens(lm, *packed_tokens(lm, [prompt]), [prompt], config, 300)
        alone.append([t for (t,), _ in steps][:end])
    sizes = []
    lm.register_forward_pre_hook(lambda m, args, kwargs: sizes.append(len(kwargs["state"][0].ssm)), with_kwargs=True)
    assert tokens_until_the_ends(lm, config) == alone
    assert sizes[1:] == [6] * 4 + [3] * 15  # half of them as soon as three are finished


def test_text_in_text_out(lm):
    prompts = ["once upon", "", "and it did not"]
    config = GenerationConfig(8)
    got = lm.generate(prompts, config)
    for prompt, text in zip(prompts, got, strict=True):
        ids = torch.tensor([TOKENIZER.encode(prompt) or [TOKENIZER.eos_id]])
        written = []
        with torch.no_grad():
            while len(written) < 8 and TOKENIZER.eos_id not in written:
                written.append(int(lm(ids).logits[0, -1, : TOKENIZER.vocab_size].argmax()))
                ids = torch.cat([ids, torch.tensor([written[-1:]])], 1)
        assert text == TOKENIZER.decode(written)
        assert "".join(lm.stream(prompt, config)) == text
    assert len(set(got)) == 3
    assert lm.generate([]) == []
    cut = lm.generate([prompts[0]], GenerationConfig(8, stop=(got[0][3:5],)))
    assert cut == [got[0][: got[0].index(got[0][3:5])]]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_tokenizer_larger_than_the_model(penalty):
    """Texts whose tokens the model has are gone on with, in tokens that it has; others are refused by name."""
    torch.manual_seed(0)
    small = MambaLM(LMConfig(32, 1, 270), TOKENIZER).eval()
    assert (small.config.padded_vocab_size, TOKENIZER.vocab_size > 272) == (272, True)
    with torch.no_grad():  # the likeliest rows are those that fill up the embedding
        small.lm_head.weight[270:] = small.lm_head.weight.sum(0)
    config = GenerationConfig(20, repetition_penalty=penalty)
    *_, (answer,) = generate_texts(small, ["xyz"], config)
    assert len(answer.ids) == 20 and max(answer.ids) < 270
    for token in (270, 271, TOKENIZER.vocab_size - 1):
        text = TOKENIZER.decode([token])
        assert max(TOKENIZER.encode(text)) == token
        message = f"sequence 1 has token {token}, but the model's vocabulary has 270 tokens"
        with pytest.raises(ValueError, match=message):
            small.generate(["xyz", text], config)
        with pytest.raises(ValueError, match=message):
            score(small, [[1], [1]], [[2], [token]])
        with pytest.raises(ValueError, match=message):
            score(small, [[1], [token]], [[2], [3]])


def test_a_tokenizer_smaller_than_the_model(lm):
    """A prompt of tokens may have those that have no text; they are run, and count for no penalty."""
    short = Tokenizer.train(["once upon a time"], 260)
    extra = [5, short.vocab_size, 299]
    assert short.vocab_size < 299
    for config in (GenerationConfig(6), GenerationConfig(6, repetition_penalty=1.5)):
        *_, (answer,) = generate_packed(lm, *packed_tokens(lm, [extra]), [extra], short, config)
        assert answer.ids and max(answer.ids) < short.vocab_size
        for step, token in enumerate(answer.ids):
            ids = torch.tensor([extra + answer.ids[:step]])
            with torch.no_grad():
                logits = lm(ids).logits[0, -1, : short.vocab_size]
            seen = ids[ids < short.vocab_size].unique()
            p = config.repetition_penalty
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / p, logits[seen] * p)
            assert token == int(logits.argmax())


def test_the_ids_of_a_tokenizer_may_have_gaps(tmp_path):
    data = json.loads(TOKENIZER.inner.to_str())
    last = max(data["model"]["vocab"], key=data["model"]["vocab"].get)
    data["model"]["vocab"][last] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.inner.get_vocab_size() == TOKENIZER.vocab_size
    assert tokenizer.vocab_size == 5001


@pytest.mark.parametrize("text", ["half of a pair \ud83d", "\udcff"])
def test_a_text_that_cannot_be_tokenized_is_a_value_error(text, lm):
    with pytest.raises(ValueError, match="the text cannot be tokenized"):
        lm.generate([text])


def test_bad_arguments_are_named(lm):
    with pytest.raises(ValueError, match="prompts must be a list of texts, got the text 'once'"):
        lm.generate("once")
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, got 0"):
        GenerationConfig(prefill_chunk=0)
    lm.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        lm.generate(["once"])


class NothingIsRead(TorchDispatchMode):
    """Fails where the host reads a value of a tensor, which on a GPU makes it wait and breaks a capture."""

    def __init__(self):
        super().__init__()
        self.names, self.devices = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        assert function._overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.equal,
        ), f"the host reads: {function}"
        result = function(*args, **(kwargs or {}))
        self.devices |= {t.device.type for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        return result


def test_a_step_reads_nothing_from_the_device(lm):
    """On the meta device there is nothing to read; taken for a GPU, it goes the way of one, kernels included."""
    with fake_target(Target(("cuda", 90), 132)):
        lm = lm.to("meta")
        decoder = Decoder(lm, 3)
        with NothingIsRead() as ran:
            logits = decoder(torch.zeros(3, dtype=torch.int64, device="meta"))
    assert logits.shape == (3, 304)
    assert ran.devices == {"meta"}  # nor is anything sent to the device
    assert any("ssm_kernels" in name and "step" in name for name in ran.names)
    with pytest.raises(AssertionError, match="the host reads"), NothingIsRead():
        torch.ones(1).item()


@pytest.mark.parametrize("config", [GenerationConfig(repetition_penalty=1.2), SAMPLED], ids=["greedy", "sampled"])
def test_choosing_reads_nothing_from_the_device(config):
    sequences = [SequenceSampling(config, prompt, 300, torch.device("cpu")) for prompt in ([1], [2, 3])]
    with NothingIsRead():
        choose_tokens(torch.randn(2, 304), sequences, 300)


def test_decoding_stays_where_it_is_in_memory(lm):
    decoder, prompts = Decoder(lm, 2), PROMPTS[:2]
    buffers = [decoder.tokens, *(t for layer in decoder.state for t in layer)]
    places, values = [t.data_ptr() for t in buffers], [t.clone() for t in buffers]
    for _ in generate_tokens(lm, *packed_tokens(lm, prompts), prompts, GenerationConfig(6), 300, decoder=decoder):
        now = [decoder.tokens, *(t for layer in decoder.state for t in layer)]
        assert [t.data_ptr() for t in now] == places
    assert all(not torch.equal(a, b) for a, b in zip(now, values, strict=True))


@pytest.mark.skipif(not HAS_NUMBA, reason="needs numba")
def test_steps_are_fused_where_that_bypasses_nothing(lm, caplog, monkeypatch):
    monkeypatch.setattr(decoding, "_logged", set())
    tokens = torch.tensor([5, 7])

    def step(is_fused, batch=2):
        decoder = Decoder(lm, batch)
        logits = decoder(tokens[:batch])
        assert bool(decoder.fused) == is_fused
        return logits

    fused = step(True)
    with use_backend("torch"):
        torch.testing.assert_close(fused, step(False), rtol=1e-4, atol=1e-4)
    tokens = tokens.repeat(9)
    n_weights = sum(p.numel() for p in lm.parameters())
    for factor, is_fused in ((16, True), (15, False)):
        monkeypatch.setattr(decoding, "MAX_FUSED_WORK", factor * n_weights)
        assert step(is_fused, 16).shape[0] == 16 > decoding.MAX_FUSED_BATCH
    step(True, decoding.MAX_FUSED_BATCH)
    calls, projection = [], lm.backbone.layers[1].mixer.out_proj
    hook = projection.register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.INFO):
        step(False), step(False)
    assert len(calls) == 2
    reason = "Linear is adapted, quantized, hooked, or of an unknown kind"
    assert [r.message for r in caplog.records] == [f"decoding runs op by op: {reason}"]
    hook.remove()
    step(True)


def test_a_fused_step_follows_weights_that_move(lm):
    decoder = Decoder(lm, 1)
    decoder(torch.tensor([5]))
    for p in lm.parameters():
        p.data = p.data * 1.5
    decoder.reset()
    torch.testing.assert_close(decoder(torch.tensor([5])), lm(torch.tensor([[5]])).logits[:, 0], rtol=1e-4, atol=1e-4)


def test_state_made_in_inference_mode_can_be_used_outside(lm):
    with torch.inference_mode():
        decoder = Decoder(lm, 1)
        first = decoder(torch.tensor([5])).clone()
    decoder.reset()
    torch.testing.assert_close(decoder(torch.tensor([5])), first)


@pytest.fixture
def captured(monkeypatch):
    """A CPU taken for a GPU: a capture runs nothing, a replay runs the step into memory that stays. Gives the sizes."""
    captures = []

    def capture(step, device):
        static = torch.full((step.__self__.batch, 304), torch.nan)
        captures.append(len(static))
        return lambda: static.copy_(step()), static

    monkeypatch.setattr(decoding, "has_graphs", lambda device: True)
    monkeypatch.setattr(decoding, "warm_up", lambda step, device: step())
    monkeypatch.setattr(decoding, "capture", capture)
    monkeypatch.setattr(decoding, "_decoders", weakref.WeakKeyDictionary())
    monkeypatch.setattr(cuda_graph, "_warned", set())
    return captures


def test_one_graph_for_each_number_of_sequences(lm, captured, monkeypatch):
    with monkeypatch.context() as plain:
        plain.setattr(decoding, "has_graphs", lambda device: False)
        want = tokens_until_the_ends(lm, SAMPLED)
    assert tokens_until_the_ends(lm, SAMPLED) == want
    assert captured == [6, 3]
    assert tokens_until_the_ends(lm, SAMPLED) == want  # with the graphs that are there
    assert tokens_until_the_ends(lm, SAMPLED, PROMPTS[:3]) == want[:3]
    assert captured == [6, 3, 1]


def test_another_stream_gets_a_decoder_of_its_own(lm, captured, monkeypatch):
    for stream in (1, 1, 2):
        monkeypatch.setattr(cuda_graph, "current_stream", lambda device, stream=stream: stream)
        tokens_until_the_ends(lm, SAMPLED, PROMPTS[:1])
    assert captured == [1, 1]


def test_two_at_once_do_not_share_memory(lm, captured):
    config, prompts = GenerationConfig(12), ["once upon", "and it did not"]
    want = [lm.generate([p], config)[0] for p in prompts]
    steps = [generate_texts(lm, [p], config) for p in prompts]
    *_, (one, two) = zip(*steps, strict=False)
    assert [one[0].text, two[0].text] == want
    assert captured == [1, 1]


def test_graphs_are_not_replayed_with_other_weights(lm, captured):
    first = tokens_until_the_ends(lm, SAMPLED)
    lm.lm_head.weight = lm.backbone.embedding.weight = torch.nn.Parameter(-lm.lm_head.weight)
    assert tokens_until_the_ends(lm, SAMPLED) != first
    assert captured == [6, 3, 6, 3]


def test_where_capture_fails_steps_run_one_by_one_and_the_reason_is_logged_once(lm, captured, monkeypatch, caplog):
    want = tokens_until_the_ends(lm, SAMPLED)

    def fails(step, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "capture", fails)
    decoding._decoders.clear()
    with caplog.at_level(logging.WARNING):
        assert tokens_until_the_ends(lm, SAMPLED) == want
        assert tokens_until_the_ends(lm, SAMPLED) == want
    assert [r.message for r in caplog.records] == [
        "decoding runs without a CUDA graph, since capture failed: operation not permitted when stream is capturing"
    ]


def test_text_that_may_start_a_stop_string_is_withheld_at_little_cost():
    """However long the stop string is: every token is compared with it."""
    a, b = (TOKENIZER.inner.token_to_id(c) for c in "ab")
    completion, texts = Completion(TOKENIZER, ("aab",)), []
    for token in (b, a, a, a, b):
        completion.push(token)
        texts.append(completion.text)
    assert texts == ["b", "b", "b", "ba", "ba"] and completion.finished
    endless, start = Completion(TOKENIZER, ("b" * 100_000,)), time.process_time()
    for _ in range(300):
        endless.push(b)
    assert endless.text == "" and time.process_time() - start < 2
    endless.finish()
    assert endless.text == "b" * 300
