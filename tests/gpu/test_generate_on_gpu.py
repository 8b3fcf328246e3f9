"""Decoding in CUDA graphs, on a GPU: the tokens are those of decoding without, and of a CPU."""

from __future__ import annotations

import logging

import pytest
import torch

from ssm_kernels.testing import is_interpreted
from tests.makers import random_prompts, sharpened_lm
from vlmamba.model import GenerationConfig, LMConfig, Tokenizer
from vlmamba.model.generation import cuda_graph, decoding
from vlmamba.model.generation.decoding import Decoder
from vlmamba.model.generation.generate import generate_tokens
from vlmamba.model.generation.prefill import packed_tokens
from vlmamba.model.mamba_ssm import MambaConfig, MambaLMHeadModel
from vlmamba.model.score import score

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU", allow_module_level=True)
if is_interpreted():
    pytest.skip("TRITON_INTERPRET=1 interprets the kernels on a CPU", allow_module_level=True)
pytestmark = pytest.mark.gpu

CONFIGS = {
    "mamba": LMConfig(128, 4, 300, "mamba", d_state=16),
    "mamba2": LMConfig(128, 4, 300, "mamba2", d_state=64, headdim=32),
}
LENGTHS = (5, 1, 230, 64, 2, 17)
PROMPTS = random_prompts(LENGTHS)
ENDS = (6, 40, 10, 3, 18, 40)
GREEDY = GenerationConfig(40)
SAMPLED = GenerationConfig(40, temperature=1.0, top_k=50, repetition_penalty=1.1, seed=3)


@pytest.fixture(params=CONFIGS)
def lm(request):
    return sharpened_lm(CONFIGS[request.param], embedding=30, out_proj=10).cuda()


@pytest.fixture
def captures(monkeypatch):
    """Batch sizes of the steps that were captured."""
    sizes, capture = [], decoding.capture

    def watched(step, device):
        sizes.append(step.__self__.batch)
        return capture(step, device)

    monkeypatch.setattr(decoding, "capture", watched)
    return sizes


def tokens(lm, config):
    finished, got = [False] * len(PROMPTS), [[] for _ in PROMPTS]
    for step, _ in generate_tokens(lm, *packed_tokens(lm, PROMPTS), PROMPTS, config, 300, finished=finished):
        for i, token in enumerate(step):
            if not finished[i]:
                got[i].append(token)
                finished[i] = len(got[i]) == ENDS[i]
    return got


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_graphs_change_no_token(lm, config, captures, monkeypatch):
    with monkeypatch.context() as plain:
        plain.setattr(decoding, "has_graphs", lambda device: False)
        want = tokens(lm, config)
    assert not captures
    assert tokens(lm, config) == want
    assert captures == [6, 3]
    assert tokens(lm, config) == want  # replayed from the start
    assert captures == [6, 3]


def test_tokens_are_those_of_a_cpu(lm):
    on_gpu, on_cpu = tokens(lm, GREEDY), tokens(lm.cpu(), GREEDY)
    # Later ones may part where two are equally likely to rounding.
    assert [t[:8] for t in on_gpu] == [t[:8] for t in on_cpu]


def test_no_graph_under_autocast(lm, captures):
    with torch.autocast("cuda", torch.bfloat16):
        tokens(lm, GREEDY)
    assert not captures


def test_a_step_does_not_synchronize_host_and_device(lm):
    decoder, last = Decoder(lm, 2), torch.tensor([3, 4], device="cuda")
    for _ in range(Decoder.WARM_UP + 1):
        decoder(last)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder(last)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 2 in decoder.graphs


def test_other_weights_are_captured_anew(lm, captures):
    first = tokens(lm, GREEDY)
    lm.bfloat16()
    tokens(lm, GREEDY)
    lm.float()
    with torch.no_grad():
        lm.lm_head.weight.neg_()  # in place: no new capture, and the new values
    assert tokens(lm, GREEDY) != first
    assert captures == [6, 3] * len(captures[::2]) and len(captures) >= 4


def test_two_streams_at_once_do_not_mix(lm):
    lm.tokenizer = Tokenizer.train(["once upon a time", "and it did not"], 300)
    texts = ["once upon", "and it"]
    want = [lm.generate([t], GREEDY)[0] for t in texts]
    texts_streamed = [[], []]
    streams = [lm.stream(t, GREEDY) for t in texts]
    while streams[0] is not None or streams[1] is not None:
        for i, stream in enumerate(streams):
            text = None if stream is None else next(stream, None)
            if text is None:
                streams[i] = None
            else:
                texts_streamed[i].append(text)
    assert ["".join(t) for t in texts_streamed] == want


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_mamba_ssm_decoding_on_two_streams_does_not_mix(layer):
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=128, n_layer=4, vocab_size=300, ssm_cfg={"layer": layer})).cuda()
    one, two = torch.randint(300, (2, 2, 12)).cuda()
    want = [model.generate(ids, 30) for ids in (one, two)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model.generate(one, 30, cg=True)  # captures
    torch.cuda.synchronize()

    def sleeps(module, args, result):
        # Between the prefill and the first step of the call on the other stream.
        if args[0].shape[1] > 1 and torch.cuda.current_stream() == stream:
            torch.cuda._sleep(1_000_000_000)  # clock cycles: half a second

    hook = model.register_forward_hook(sleeps)
    with torch.cuda.stream(stream):
        late = model.generate(one, 30, cg=True)
    found = model.generate(two, 30, cg=True)
    hook.remove()
    torch.cuda.synchronize()
    assert late.equal(want[0]) and found.equal(want[1])


def test_where_capture_fails_the_tokens_are_the_same(lm, monkeypatch, caplog):
    want = tokens(lm, GREEDY)
    decoding._decoders.clear()
    step = Decoder.step

    def reads(self):
        logits = step(self)
        float(logits.sum())  # the host reads: not permitted while a stream is captured
        return logits

    monkeypatch.setattr(Decoder, "step", reads)
    monkeypatch.setattr(cuda_graph, "_warned", set())
    with caplog.at_level(logging.WARNING):
        assert tokens(lm, GREEDY) == want
    assert sum("without a CUDA graph" in r.message for r in caplog.records) == 1
    torch.cuda.synchronize()  # no error is pending on the device


def test_a_long_prompt_takes_the_memory_of_a_prefill_chunk(lm):
    peaks = []
    for length in (20_000, 131_072):
        prompt = [7] * length
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        list(generate_tokens(lm, *packed_tokens(lm, [prompt]), [[]], GenerationConfig(2, prefill_chunk=4096), 300))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.2 * peaks[0]


def test_scores_are_those_of_a_cpu(lm):
    answers = [p[::-1] for p in PROMPTS]
    got = score(lm, PROMPTS, answers)
    want = score(lm.cpu(), PROMPTS, answers)
    assert [s.greedy for s in got] == [s.greedy for s in want]
    torch.testing.assert_close([s.logprob for s in got], [s.logprob for s in want], rtol=1e-3, atol=1e-2)
