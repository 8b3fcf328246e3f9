"""The language models against `transformers` on the same random weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from ssm_kernels import use_backend
from tests.model.originals import config_pair, random_original, with_weights_of
from vlmamba.model import LMConfig, MambaLM

CONFIGS = {
    "mamba": config_pair("mamba", 3),
    "falcon": (
        LMConfig(32, 2, 101, "mamba", d_state=8, dt_rank=3, bias=True, conv_bias=False, dt_bc_norm_eps=1e-2),
        transformers.FalconMambaConfig(
            vocab_size=104, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=3, use_bias=True,
            use_conv_bias=False, mixer_rms_eps=1e-2, pad_token_id=0,
        ),
    ),
    "mamba2": config_pair("mamba2", 3, ngroups=2),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def pair(request, skip_ignored_norm_groups):
    """Our model and theirs with the same weights, none at its initial value."""
    ours_config, theirs_config = CONFIGS[request.param]
    skip_ignored_norm_groups(theirs_config)
    theirs = random_original(theirs_config)
    return with_weights_of(theirs, ours_config), theirs


IDS = torch.randint(0, 101, (2, 21), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_agree(pair):
    ours, theirs = pair
    want = theirs(IDS, output_hidden_states=True)
    got = ours(IDS)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.hidden, want.hidden_states[-1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_decoding_step_by_step_agrees(pair):
    ours, theirs = pair
    state = ours.new_state(2)
    steps = [ours(IDS[:, :9], state=state).logits] + [ours(IDS[:, t : t + 1], state=state).logits for t in range(9, 21)]
    torch.testing.assert_close(torch.cat(steps, 1), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_greedy_tokens_agree(pair):
    ours, theirs = pair
    want = theirs.generate(IDS[:1, :7], max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, 7:].tolist()
    state, ids, got = ours.new_state(1), IDS[:1, :7], []
    for _ in range(20):
        logits = ours(ids, state=state).logits[:, -1]
        logits[:, 0] = -torch.inf  # theirs may not end before 20 tokens
        ids = logits.argmax(-1, keepdim=True)
        got.append(int(ids))
    assert got == want


@torch.no_grad()
def test_packed_sequences_give_what_each_gives_alone(pair):
    ours, _ = pair
    parts = [IDS[:1, :5], IDS[:1, 5:6], IDS[1:, :13]]
    bounds = torch.tensor([0, 5, 6, 19])
    state = ours.new_state(3)
    packed = ours(torch.cat(parts, 1), state=state, cu_seqlens=bounds).logits
    for i, part in enumerate(parts):
        alone = ours.new_state(1)
        torch.testing.assert_close(packed[:, bounds[i] : bounds[i + 1]], ours(part, state=alone).logits)
        for layer, layer_alone in zip(state, alone, strict=True):
            torch.testing.assert_close(layer.conv[i], layer_alone.conv[0])
            torch.testing.assert_close(layer.ssm[i], layer_alone.ssm[0])


def test_gradients_flow_to_every_parameter(pair):
    ours, theirs = pair
    for model in (ours, theirs):
        model(IDS).logits.square().mean().backward()
    their_grads = {n.replace("embeddings.", "embedding."): p.grad for n, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, their_grads[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("packed", [False, True])
def test_bptt_over_parts_is_that_of_the_whole(pair, packed):
    ours = pair[0].double()
    ids, bounds = (IDS[:1], torch.tensor([0, 13, 21])) if packed else (IDS, None)
    with use_backend("torch"):
        want = ours(ids, cu_seqlens=bounds, return_state=True)
        if packed:  # sequences of 13 and 8 tokens, whose parts are 4 + 9 and 7 + 1
            parts = [torch.cat([ids[:, :4], ids[:, 13:20]], 1), torch.cat([ids[:, 4:13], ids[:, 20:]], 1)]
            first = ours(parts[0], cu_seqlens=torch.tensor([0, 4, 11]), return_state=True)
            last = ours(parts[1], state=first.state, cu_seqlens=torch.tensor([0, 9, 10]), return_state=True)
            cuts = first.logits[:, :4], last.logits[:, :9], first.logits[:, 4:], last.logits[:, 9:]
        else:
            last, cuts = ours(ids[:, :0], return_state=True), []
            for part in ids.split([9, 1, 2, 9], dim=1):
                last = ours(part, state=last.state, return_state=True)
                cuts.append(last.logits)
    logits, parameters = torch.cat(list(cuts), dim=1), list(ours.parameters())
    torch.testing.assert_close(logits, want.logits)
    losses = [
        logits.square().sum() + sum(t.sin().sum() for layer in state for t in layer)
        for logits, state in ((logits, last.state), (want.logits, want.state))
    ]
    for got, expected in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        assert (got - expected).abs().max() <= 1e-10 * expected.abs().max() > 0


def test_states_of_other_layers_are_named():
    lm = MambaLM(CONFIGS["mamba"][0])
    with pytest.raises(ValueError, match="state must have an entry for each of 3 layers, got 1"):
        lm(IDS, state=lm.new_state(2)[:1])
    with pytest.raises(ValueError, match=r"state.ssm must have shape .* got \(2, "):
        lm(IDS, state=MambaLM(LMConfig(32, 3, 101, d_state=5)).new_state(2), return_state=True)


@torch.no_grad()
def test_logits_at_chosen_positions():
    lm = MambaLM(CONFIGS["mamba"][0])
    at = torch.tensor([3, 20])
    torch.testing.assert_close(lm(IDS, logits_at=at).logits, lm(IDS).logits[:, at])


def test_bfloat16_keeps_the_residual_in_float32():
    lm = MambaLM(CONFIGS["mamba2"][0]).bfloat16()
    out = lm(IDS)
    assert (out.hidden.dtype, out.logits.dtype) == (torch.bfloat16, torch.float32)
    exact = MambaLM(CONFIGS["mamba2"][0])
    exact.load_state_dict(lm.state_dict())
    assert (out.logits - exact(IDS).logits).abs().max() < 0.05 * exact(IDS).logits.abs().max() + 0.05


def test_bad_input_is_named():
    lm = MambaLM(CONFIGS["mamba"][0])
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 104\), got values from 5 to 200"):
        lm(torch.tensor([[5, 200]]))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        lm()
    with pytest.raises(ValueError, match="layer must be one of 'mamba', 'mamba2', 'mamba3'; got 'rwkv'"):
        LMConfig(layer="rwkv")
    with pytest.raises(ValueError, match="dt_bc_norm_eps is for Mamba-1 layers only, got 1e-06 for 'mamba2'"):
        LMConfig(layer="mamba2", dt_bc_norm_eps=1e-6)
    with pytest.raises(ValueError, match="n_layer must be in"):
        LMConfig(n_layer=0)


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_hooks_of_every_layer_run_and_change_nothing(layer, residual_in_fp32):
    lm = MambaLM(LMConfig(32, 2, 101, layer, headdim=16, residual_in_fp32=residual_in_fp32)).eval()
    want, seen = lm(IDS).logits, []
    watched = [n for n, m in lm.named_modules() if n and not isinstance(m, torch.nn.Conv1d | torch.nn.ModuleList)]
    for name in watched:
        lm.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(lm(IDS).logits, want)
    assert sorted(seen) == sorted(watched)
    lm.backbone.layers[1].norm.register_forward_hook(lambda m, i, o: 2 * o)
    assert not torch.allclose(lm(IDS).logits, want)


@pytest.mark.filterwarnings("ignore")  # PyTorch moves its quantization to another package
@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_a_dynamically_quantized_model_decodes(layer):
    torch.manual_seed(0)
    lm = MambaLM(LMConfig(32, 2, 101, layer, headdim=16)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(lm, {torch.nn.Linear}, dtype=torch.qint8)
    assert quantized.device.type == "cpu" and not isinstance(quantized.lm_head, torch.nn.Linear)
    with torch.no_grad():
        want, got, state = lm(IDS).logits, quantized(IDS).logits, quantized.new_state(2)
        steps = [quantized(IDS[:, t : t + 1], state=state).logits for t in range(IDS.shape[1])]
    near = {"rtol": 0.1, "atol": 0.1 * want.abs().max().item()}
    torch.testing.assert_close(got, want, **near)
    torch.testing.assert_close(torch.cat(steps, 1), got, **near)


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
def test_marks_of_parameters_outlive_a_checkpoint(layer, tmp_path):
    lm = MambaLM(LMConfig(32, 1, 101, layer, headdim=16))
    lm.save_pretrained(tmp_path)
    for model in (lm, MambaLM.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        marked = {n.split(".")[-1] for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert marked == {"A_log", "D"} | ({"dt_bias"} if layer == "mamba2" else set())
        kept = {n.split("mixer.")[-1] for n, p in model.named_parameters() if getattr(p, "_no_reinit", False)}
        assert kept == ({"dt_proj.bias"} if layer == "mamba" else set())
