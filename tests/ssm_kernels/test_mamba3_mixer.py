"""The Mamba-3 mixer: states with gradients and in place, packed sequences, the parameters of the published layout."""

from __future__ import annotations

import pytest
import torch

from ssm_kernels import Mamba3States, states
from ssm_kernels.modules import Mamba3

MIXERS = {
    "siso": {},
    "siso with a norm": {"is_outproj_norm": True, "rope_fraction": 1.0},
    "mimo": {"is_mimo": True, "mimo_rank": 3},
    "mimo with a norm": {"is_mimo": True, "mimo_rank": 2, "is_outproj_norm": True, "ngroups": 2},
}
pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.fixture(params=MIXERS)
def mixer(request) -> Mamba3:
    torch.manual_seed(0)
    mixer = Mamba3(8, d_state=6, headdim=4, **MIXERS[request.param]).double()
    with torch.no_grad():
        mixer.dt_bias.add_(4)  # steps so large that the state turns and decays
        for name in ("B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"):
            if hasattr(mixer, name):
                getattr(mixer, name).normal_()
    return mixer


def random_state(mixer: Mamba3, batch: int) -> Mamba3States:
    return Mamba3States(*(torch.randn_like(t) for t in mixer.new_state(batch)))


def test_bptt_over_packed_parts_is_that_of_the_whole(mixer):
    """Sequences of 7, 0 and 4 steps, whose parts are 3 + 4, 0 + 0 and 1 + 3; the loss depends on the final state."""
    first, second = (torch.randn(1, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 7))
    whole = torch.cat([first[:, :3], second[:, :4], first[:, 3:], second[:, 4:]], dim=1)
    start = Mamba3States(*(t.requires_grad_() for t in random_state(mixer, 3)))
    y, final = mixer(whole, start, torch.tensor([0, 7, 7, 11]), return_state=True)
    y_first, state = mixer(first, start, torch.tensor([0, 3, 3, 4]), return_state=True)
    y_second, state = mixer(second, state, torch.tensor([0, 4, 4, 7]), return_state=True)
    y_parts = torch.cat([y_first[:, :3], y_second[:, :4], y_first[:, 3:], y_second[:, 4:]], dim=1)
    torch.testing.assert_close(y_parts, y)
    want, got = (t.square().sum() + sum(part.sin().sum() for part in end) for t, end in ((y, final), (y_parts, state)))
    inputs = [first, second, *start, *mixer.parameters()]
    for grad, expected in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        assert (grad - expected).abs().max() <= 1e-10 * expected.abs().max() > 0


@torch.no_grad()
def test_in_place_and_step_by_step_is_the_same(mixer):
    x, before = torch.randn(2, 6, 8, dtype=torch.float64), random_state(mixer, 2)
    given, in_place = states.clone(before), states.clone(before)
    y, after = mixer(x, given, return_state=True)
    torch.testing.assert_close(given, before, rtol=0, atol=0)
    steps = [mixer(x[:, :4], in_place), mixer(x[:, 4:5], in_place)]
    last, end = mixer(x[:, 5:], in_place, return_state=True)  # a step that leaves its state
    torch.testing.assert_close(torch.cat([*steps, last], 1), y)
    torch.testing.assert_close(end, after)


def test_states_are_moved_saved_and_reset(mixer, tmp_path):
    state = random_state(mixer, 3)
    states.save([state, state], tmp_path / "state.safetensors")
    layers = type("Layers", (), {"new_state": lambda _, batch: [mixer.new_state(batch)] * 2})()
    loaded = states.load(tmp_path / "state.safetensors", layers)
    torch.testing.assert_close(loaded, [state, state], rtol=0, atol=0)
    assert {t.dtype for t in states.to(state, dtype=torch.bfloat16)} == {torch.float32}
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    reset = states.reset(states.select(loaded[0], [2, 0]), torch.tensor([True, False]))
    torch.testing.assert_close(mixer(x, reset, return_state=True).y[:1], mixer(x[:1]))


def test_parameters_are_those_of_the_published_layout():
    mixer = Mamba3(64, is_mimo=True, is_outproj_norm=True)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "in_proj.weight": (2 * 128 + 2 * 4 * 128 + 3 * 2 + 32, 64), "out_proj.weight": (64, 128), "dt_bias": (2,),
        "B_bias": (2, 4, 128), "C_bias": (2, 4, 128), "B_norm.weight": (128,), "C_norm.weight": (128,), "D": (2,),
        "mimo_x": (2, 4, 64), "mimo_z": (2, 4, 64), "mimo_o": (2, 4, 64), "norm.weight": (128,),
    }  # fmt: skip


def test_states_and_sizes_that_do_not_fit_are_named(mixer):
    x, state = torch.randn(2, 4, 8, dtype=torch.float64), mixer.new_state(2)
    with pytest.raises(TypeError, match="state must be a Mamba3States, got list"):
        mixer(x, [state])
    with pytest.raises(ValueError, match="initial_states.angles"):
        mixer(x, mixer.new_state(3))
    with pytest.raises(TypeError, match="state.angles must hold all digits of torch.float64, .* got torch.float32"):
        mixer(x, states.to(state, dtype=torch.float32))
    with pytest.raises(ValueError, match="requires gradients, .* updated in place: pass return_state=True"):
        mixer(x, Mamba3States(*(t.requires_grad_() for t in state)))
    for options, message in (
        ({"headdim": 5}, "headdim must divide expand \\* d_model = 16, got 5"),
        ({"ngroups": 3}, "ngroups must divide the 4 heads, got 3"),
        ({"rope_fraction": 0.3}, "rope_fraction must be 0.5 or 1, got 0.3"),
        ({"d_state": 3}, "d_state must be at least 4, and even with is_mimo, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            Mamba3(8, **({"headdim": 4, "d_state": 8} | options))
