"""States of mixers: gradients through them, operations on them, files, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ssm_kernels import states
from ssm_kernels.modules import Mamba, Mamba2, MixerState

MIXERS = {"mamba": lambda: Mamba(8, d_state=3), "mamba2": lambda: Mamba2(8, d_state=3, headdim=4, chunk_size=4)}
pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.fixture(params=MIXERS)
def mixer(request) -> nn.Module:
    torch.manual_seed(0)
    return MIXERS[request.param]().double()


def random_state(mixer: nn.Module, batch: int) -> MixerState:
    return MixerState(*(torch.randn_like(t) for t in mixer.new_state(batch)))


def loss(y: Tensor, state: MixerState) -> Tensor:
    """Depend on the outputs and on both parts of the final state."""
    return y.square().sum() + state.conv.sin().sum() + state.ssm.sin().sum()


def assert_same_gradients(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    """Compare gradients of two losses to 1e-10 of the largest element."""
    torch.testing.assert_close(got, want)
    for grad, expected in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        assert (grad - expected).abs().max() <= 1e-10 * expected.abs().max() > 0


def test_bptt_over_parts_is_that_of_the_whole(mixer):
    """Unequal parts, one shorter than the convolution; the loss depends on the final state too."""
    x = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    start = MixerState(*(t.requires_grad_() for t in random_state(mixer, 2)))
    y, want = mixer(x, start, return_state=True)
    state, parts = start, []
    for part in x.split([5, 1, 2, 3], dim=1):
        y_part, state = mixer(part, state, return_state=True)
        parts.append(y_part)
    assert_same_gradients(loss(torch.cat(parts, 1), state), loss(y, want), [x, *start, *mixer.parameters()])


@pytest.mark.usefixtures("default_or_reference")
def test_bptt_over_packed_parts_is_that_of_the_whole(mixer):
    """Sequences of 7, 0 and 4 steps, whose parts are 3 + 4, 0 + 0 and 1 + 3."""
    first, second = (torch.randn(1, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 7))
    whole = torch.cat([first[:, :3], second[:, :4], first[:, 3:], second[:, 4:]], dim=1)
    y, want = mixer(whole, cu_seqlens=torch.tensor([0, 7, 7, 11]), return_state=True)
    y_first, state = mixer(first, cu_seqlens=torch.tensor([0, 3, 3, 4]), return_state=True)
    y_second, state = mixer(second, state, torch.tensor([0, 4, 4, 7]), return_state=True)
    y_parts = torch.cat([y_first[:, :3], y_second[:, :4], y_first[:, 3:], y_second[:, 4:]], dim=1)
    assert_same_gradients(loss(y_parts, state), loss(y, want), [first, second, *mixer.parameters()])


def test_both_forms_have_the_same_values(mixer):
    """In one forward, and in a decoding step, whose op changes a copy."""
    before = random_state(mixer, 2)
    with torch.no_grad():
        for length in (6, 1):
            x = torch.randn(2, length, 8, dtype=torch.float64)
            given, in_place = states.clone(before), states.clone(before)
            y, after = mixer(x, given, return_state=True)
            torch.testing.assert_close(mixer(x, in_place), y)
            torch.testing.assert_close(in_place, after)
            torch.testing.assert_close(given, before, rtol=0, atol=0)


def test_dtypes_are_those_of_the_given_state_or_of_a_new_one():
    mixer = Mamba(8, d_state=3).bfloat16()
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    _, state = mixer(x, return_state=True)
    assert [t.dtype for t in state] == [t.dtype for t in mixer.new_state(2)] == [torch.bfloat16, torch.float32]
    _, state = mixer(x, states.to(state, dtype=torch.float64), return_state=True)
    assert [t.dtype for t in state] == [torch.float64, torch.float64]


def test_a_reset_row_starts_anew_and_stops_gradients(mixer):
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    start = MixerState(*(t.requires_grad_() for t in random_state(mixer, 2)))
    y = mixer(x, states.reset(start, torch.tensor([True, False])), return_state=True).y
    torch.testing.assert_close(y[:1], mixer(x[:1]))
    for grad in torch.autograd.grad(y.sum(), list(start)):
        assert not grad[0].any() and grad[1].any()


def test_rows_are_selected_and_repeated_for_continuations(mixer):
    layers = [random_state(mixer, 3), random_state(mixer, 3)]
    for rows in ([2, 0], torch.tensor([2, 0]), torch.tensor([True, False, True]), slice(0, 3, 2)):
        chosen = states.select(layers, rows)
        assert [t.shape[0] for layer in chosen for t in layer] == [2] * 4
        kept = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        torch.testing.assert_close(chosen[1].ssm, layers[1].ssm[kept])
    twice = states.repeat(layers, 2)
    torch.testing.assert_close(twice, states.select(layers, [0, 0, 1, 1, 2, 2]))
    x = torch.randn(6, 4, 8, dtype=torch.float64)
    y = mixer(x, twice[0], return_state=True).y
    torch.testing.assert_close(y[4:5], mixer(x[4:5], states.select(layers[0], [2]), return_state=True).y)


def test_states_are_detached_copied_and_moved(mixer):
    state = MixerState(*(t.requires_grad_() for t in random_state(mixer, 2)))
    assert states.detach(state).ssm.data_ptr() == state.ssm.data_ptr() and not states.detach(state).ssm.requires_grad
    assert states.clone(state).ssm.data_ptr() != state.ssm.data_ptr() and states.clone(state).ssm.requires_grad
    moved = states.to([state], "meta", torch.bfloat16)[0]
    assert moved.conv.device.type == "meta" and (moved.conv.dtype, moved.ssm.dtype) == (torch.bfloat16, torch.float32)


def test_a_file_brings_a_state_back(mixer, tmp_path):
    class Layers:
        def new_state(self, batch):
            return [mixer.new_state(batch), mixer.new_state(batch)]

    state = random_state(mixer, 3)
    states.save(state, tmp_path / "mixer.safetensors")
    states.save([state, state], tmp_path / "model.safetensors")
    torch.testing.assert_close(states.load(tmp_path / "mixer.safetensors", mixer), state, rtol=0, atol=0)
    loaded = states.load(tmp_path / "model.safetensors", Layers())
    torch.testing.assert_close(loaded, [state, state], rtol=0, atol=0)
    assert isinstance(loaded[1], MixerState) and not list(tmp_path.glob("*.part"))


def test_bad_files_are_named(mixer, tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file: .*state.safetensors"):
        states.load(path, mixer)
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match="state.safetensors is not a safetensors file"):
        states.load(path, mixer)
    monkeypatch.setattr(states, "FORMAT", "weights")
    states.save(mixer.new_state(2), path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is not a state that ssm_kernels.states.save wrote"):
        states.load(path, mixer)
    monkeypatch.setattr(states, "VERSION", "7")
    states.save(mixer.new_state(2), path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has version 7 of the format; this library reads 1"):
        states.load(path, mixer)
    states.save(Mamba(16, d_state=3).new_state(2), path)
    with pytest.raises(ValueError, match=r"is the state of another model: conv is \(2, 3, 32\) there, and \(2, 3,"):
        states.load(path, mixer)
    states.save([mixer.new_state(2)], path)
    with pytest.raises(ValueError, match="another model: 0.conv is .* there, and missing here"):
        states.load(path, mixer)


def test_states_that_do_not_fit_are_named(mixer):
    x, state = torch.randn(2, 4, 8, dtype=torch.float64), mixer.new_state(2)
    with pytest.raises(TypeError, match="state must be a MixerState, got list"):
        mixer(x, [state])
    with pytest.raises(
        ValueError, match=r"state.conv must have shape \(2, 3, .*\), a row for each of 2 sequences; got"
    ):
        mixer(x, mixer.new_state(3))
    with pytest.raises(ValueError, match="a row for each of 3 sequences"):
        mixer(x[:1], state, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(ValueError, match=r"state.ssm must have shape .* got \(2, 1\)"):
        mixer(x, MixerState(state.conv, torch.zeros(2, 1)), return_state=True)
    with pytest.raises(TypeError, match="state.conv must hold all digits of torch.float64, .* got torch.float32"):
        mixer(x, states.to(state, dtype=torch.float32))
    with pytest.raises(ValueError, match="state.conv must be on cpu like the layer, got meta"):
        mixer(x, states.to(state, "meta"))
    with pytest.raises(ValueError, match="requires gradients, .* updated in place: pass return_state=True"):
        mixer(x, MixerState(*(t.requires_grad_() for t in state)))


def test_bad_arguments_are_named(mixer):
    state = mixer.new_state(2)
    with pytest.raises(TypeError, match="rows must be a tensor of torch.bool, got torch.int64"):
        states.reset(state, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"rows must have shape \(2,\), one a sequence; got \(3,\)"):
        states.reset(state, torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        states.repeat(state, -1)
    with pytest.raises(TypeError, match="dtype must be a floating-point dtype, got torch.int8"):
        states.to(state, dtype=torch.int8)
