"""Language models whose state is kept in fewer bits, and slots of every mixer's state."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from ssm_kernels import StateSlots, states, use_backend
from ssm_kernels.modules import LayerState, Mamba2, Mamba3, NarrowMixerState
from tests.makers import sharpened_lm
from vlmamba.model import GenerationConfig, LMConfig, MambaLM, Tokenizer
from vlmamba.model.generation.decoding import Decoder, narrow_dtype, state_bytes

TOKENIZER = Tokenizer.train(["once upon a time there was a state", "and it did not grow"] * 5, 300)
LAYERS = ("mamba", "mamba2", "mamba3")
NARROW = ("bfloat16", "float16", "int8")


def make_lm(layer: str, seed: int = 0) -> MambaLM:
    torch.manual_seed(seed)
    return MambaLM(LMConfig(d_model=16, n_layer=2, vocab_size=40, d_state=8, headdim=8, layer=layer)).eval()  # type: ignore[arg-type]


def flat(state: list[LayerState]) -> list[torch.Tensor]:
    return [t for layer in state for t in layer]


IDS = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_a_narrow_state_changes_logits_by_its_rounding(layer, dtype):
    lm = make_lm(layer)
    want = lm(IDS).logits
    state = lm.new_state(3, narrow_dtype(dtype))
    got = [lm(IDS[:, :5], state=state).logits] + [lm(IDS[:, t : t + 1], state=state).logits for t in range(5, 12)]
    error = (torch.cat(got, 1) - want).abs().max() / want.abs().max()
    assert 0 < error < {"bfloat16": 0.02, "float16": 0.003, "int8": 0.05}[dtype]
    assert all(part.rand_seed.tolist() == [8] * 3 for part in cast(Any, state))  # a prompt and seven tokens


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_steps_on_slots_are_those_of_each_sequence(layer, dtype):
    lm = make_lm(layer)
    alone = [lm.new_state(1, narrow_dtype(dtype)) for _ in range(3)]
    pool = lm.new_state(8, narrow_dtype(dtype))
    rows = [5, 2, 7]
    for ids, state, row in zip(IDS, alone, rows, strict=True):
        lm(ids[None, :5], state=state)
        lm(ids[None, :5], state=states.select(pool, slice(row, row + 1)))
    for t in range(5, 9):
        # The second sequence joins late.
        joined = [0, 1, 2] if t > 6 else [0, 2]
        slots = StateSlots(torch.tensor([rows[s] for s in joined] + [-1]))
        got = lm(IDS[[*joined, 0], t, None], state=pool, slots=slots).logits
        for i, s in enumerate(joined):
            want = lm(IDS[s : s + 1, t, None], state=alone[s]).logits
            torch.testing.assert_close(got[i : i + 1], want, rtol=1e-4, atol=1e-5)
    for row, state in zip(rows, alone, strict=True):
        for got, want in zip(flat(states.select(pool, slice(row, row + 1))), flat(state), strict=True):
            if got.is_floating_point():
                torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)
            else:  # codes and seeds: a last bit of the computation decides few roundings
                assert (got.int() - want.int()).abs().max() <= 1
    untouched = states.select(pool, [0, 1, 3, 4, 6])
    assert not any(t.any() for t in flat(untouched))


@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_the_state_after_accepted_tokens_is_taken_up(layer):
    lm = make_lm(layer)
    dtype = torch.int8
    pool = lm.new_state(5, dtype)
    after_each = torch.tensor([[1, 2, 3]])
    lm(IDS[:1, :3], state=pool, slots=StateSlots(torch.tensor([0]), after_each))
    y = lm(IDS[:1, 5:8], state=pool, slots=StateSlots(after_each, num_accepted_tokens=torch.tensor([2]))).logits
    single = lm.new_state(1, dtype)
    for t in (0, 1, 5, 6, 7):
        want = lm(IDS[:1, t, None], state=single).logits
    torch.testing.assert_close(y[:, -1:], want, rtol=1e-2, atol=1e-3)
    assert [int(part.rand_seed[3]) for part in cast(Any, pool)] == [5, 5]


def test_generation_keeps_the_state_in_the_format_asked_for(tmp_path):
    lm = make_lm("mamba2")
    sizes = {d: state_bytes(lm.new_state(1, narrow_dtype(d))) for d in ("float32", *NARROW)}
    assert sizes["int8"] < sizes["bfloat16"] == sizes["float16"] < sizes["float32"]
    decoder = Decoder(lm, 2, "int8")
    assert all(isinstance(layer, NarrowMixerState) and layer.ssm.dtype == torch.int8 for layer in decoder.state)
    decoder(torch.tensor([1, 2]))
    assert all(layer.rand_seed.tolist() == [1, 1] for layer in cast(Any, decoder.state))
    for backend in ("torch", "auto"):
        with use_backend(backend):  # no fused step takes over
            Decoder(lm, 1, "bfloat16")(torch.tensor([1]))
    with pytest.raises(ValueError, match="state_dtype must be one of"):
        GenerationConfig(state_dtype=cast(Any, "int4"))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_sequence_is_the_same_in_any_batch(layer):
    config = LMConfig(16, 2, TOKENIZER.vocab_size, layer, headdim=8, d_state=8)
    lm, draft = (sharpened_lm(config, TOKENIZER, embedding=30, out_proj=10) for _ in range(2))
    greedy = GenerationConfig(6, state_dtype="int8")
    prompts = ["once", "a state", "it did not"]
    want = lm.generate(prompts, greedy)
    assert want == [lm.generate([p], greedy)[0] for p in prompts]
    assert lm.generate(prompts, greedy, draft_model=draft) == want


@torch.no_grad()
def test_narrow_states_are_reset_saved_and_moved(tmp_path):
    for mixer in (Mamba2(16, d_state=8, headdim=8), Mamba3(16, d_state=8, headdim=8)):
        for dtype in (torch.float16, torch.int8):
            state = mixer.new_state(2, dtype)
            mixer(torch.randn(2, 5, 16), state)
            states.save(state, tmp_path / "state.safetensors")
            loaded = states.load(tmp_path / "state.safetensors", mixer)
            assert type(loaded) is type(state)
            assert all(torch.equal(a, b) for a, b in zip(loaded, state, strict=True))
            moved = states.to(state, dtype=torch.bfloat16)
            assert moved.ssm.dtype == dtype and moved.rand_seed.dtype == torch.int64
            fresh = states.reset(state, torch.tensor([True, False]))
            assert not any(t[0].any() for t in fresh)
            assert torch.equal(fresh.ssm[1], state.ssm[1])


def test_a_narrow_state_refuses_gradients_and_other_sizes():
    mixer = Mamba2(16, d_state=8, headdim=8)
    x = torch.randn(2, 1, 16)
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16, float16 or int8, got uint8"):
        mixer.new_state(2, torch.uint8)
    state = mixer.new_state(2, torch.int8)
    assert isinstance(state, NarrowMixerState)
    with pytest.raises(ValueError, match="return_state must be False with a narrow state"):
        mixer(x, cast(Any, state), return_state=True)
    with pytest.raises(ValueError, match=r"rand_seed must have shape \(2,\), got \(3\)|rand_seed must have shape"):
        mixer(x, state._replace(rand_seed=torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"state.ssm must have shape \(2, 4, 8, 8\)"):
        mixer(x, state._replace(ssm=state.ssm[:, :2], ssm_scale=state.ssm_scale[:, :2]))
    with pytest.raises(TypeError, match="state.ssm must be bfloat16, float16 or int8 in a narrow state"):
        mixer(x, state._replace(ssm=state.ssm.float()))
