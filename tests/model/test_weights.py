"""Weights: lazy reading, renaming, shards, dtypes, and strict loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlmamba.model import weights
from vlmamba.model.formats.vlm import merged
from vlmamba.model.weights import Weights, dtype_of, load_into, open_weights, save_weights

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "n": torch.tensor(3)}


def assert_equal(got, tensors):
    assert set(got) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(got[name], tensor)
        assert (got.shapes[name], got.dtypes[name]) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("limit", [5_000_000_000, 24])
def test_saved_weights_are_read_back(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", limit)
    save_weights(TENSORS, tmp_path)
    assert (tmp_path / "model.safetensors").exists() == (limit > 24)
    assert_equal(open_weights(tmp_path), TENSORS)


def test_merged_weights_have_prefixed_names():
    got = merged({"x.": Weights.from_tensors(TENSORS), "": Weights.from_tensors({"b": torch.zeros(1)})})
    assert_equal(got, {**{f"x.{n}": t for n, t in TENSORS.items()}, "b": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "stored", "wanted", "dtype"),
    [
        ("proj.weight", torch.float32, torch.bfloat16, torch.bfloat16),
        ("proj.weight", torch.float16, None, torch.float16),
        ("mixer.A_log", torch.float32, torch.bfloat16, torch.float32),
        ("mixer.D_cb", torch.float16, None, torch.float32),
        ("mixer.dt_proj.bias", torch.float64, None, torch.float64),
        ("n", torch.int64, torch.bfloat16, torch.int64),
    ],
)
def test_sensitive_parameters_stay_float32(name, stored, wanted, dtype):
    assert dtype_of(name, stored, wanted) == dtype


class Tied(nn.Module):
    """Has a tied weight, a frozen one, a buffer of floats and one of counts."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 4, bias=False)
        self.two = nn.Linear(3, 4)
        self.two.weight = self.one.weight
        self.two.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.A_log = nn.Parameter(torch.zeros(2))


def tied_weights(**changes):
    model = Tied()
    torch.nn.init.normal_(model.A_log)
    state = {n: t.clone() for n, t in model.state_dict().items() if n != "two.weight"}
    return {n: t for n, t in (state | changes).items() if t is not None}


def on_meta():
    with torch.device("meta"):
        return Tied()


def test_a_model_on_meta_gets_its_weights():
    model, state = on_meta(), tied_weights()
    load_into(model, state, "the file", torch.bfloat16)
    assert model.two.weight is model.one.weight
    assert not model.two.bias.requires_grad and model.one.weight.requires_grad
    for name, tensor in model.state_dict().items():
        stored = state[name.replace("two.weight", "one.weight")]
        assert tensor.device.type == "cpu"
        want = torch.float32 if name == "A_log" else torch.bfloat16 if stored.is_floating_point() else torch.int64
        assert tensor.dtype == want, name
        assert torch.equal(tensor, stored.to(want)), name
    state["one.weight"].zero_()  # nothing is shared with what it was read from
    assert model.one.weight.abs().sum() > 0


def test_weights_that_do_not_fit_are_listed():
    state = tied_weights(
        A_log=None, extra=torch.zeros(1), **{"one.weight": torch.zeros(4, 2), "two.bias": torch.zeros(4).int()}
    )
    with pytest.raises(ValueError, match="the file does not fit Tied:") as error:
        load_into(on_meta(), state, "the file")
    assert str(error.value).splitlines()[1:] == [
        "  missing: A_log",
        "  unexpected: extra",
        "  shape of one.weight: (4, 2) in the file, (4, 3) in the model",
        "  dtype of two.bias: torch.int32 in the file, a float in the model",
    ]
    with pytest.raises(ValueError, match="one.weight and two.weight are tied in the model but differ in the file"):
        load_into(on_meta(), tied_weights(**{"two.weight": torch.zeros(4, 3)}), "the file")


def test_renaming_reads_nothing_and_leaves_nothing_ambiguous(tmp_path):
    save_file({"a.x": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    opened = open_weights(tmp_path)
    assert dict(opened.renamed({"a.x": "c"}).shapes) == {"c": (2,), "b": (3,)}
    renamed = opened.renamed(lambda n: n.removeprefix("a.") if n.startswith("a.") else None)
    assert list(renamed) == ["x"] and torch.equal(renamed["x"], torch.ones(2))
    with pytest.raises(ValueError, match="a.x and b would both be named z"):
        opened.renamed(lambda n: "z")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_pickles_are_flattened_and_not_read_to_be_described(zipped, tmp_path):
    data = {
        "model": {"llm": {"w": torch.arange(6.0).reshape(2, 3)}, "mlp": {"0.bias": torch.ones(2).half()}},
        "step": 3,
    }
    torch.save(data, tmp_path / "latest.pt", _use_new_zipfile_serialization=zipped)
    opened = open_weights(tmp_path / "latest.pt")
    assert opened.shapes == {"model.llm.w": (2, 3), "model.mlp.0.bias": (2,)}
    assert opened.dtypes == {"model.llm.w": torch.float32, "model.mlp.0.bias": torch.float16}
    assert torch.equal(opened["model.llm.w"], torch.arange(6.0).reshape(2, 3))
    assert open_weights(tmp_path, pick="latest.pt").shapes == opened.shapes


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"w": torch.ones(2), "payload": Evil(tmp_path / "it-ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle of more than tensors. .* is refused: .*system"):
        open_weights(tmp_path)
    assert not (tmp_path / "it-ran").exists()


def damaged(path, how):
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[: len(data) - 50],
            "half": data[: len(data) // 2],
            "empty": b"",
            "page": b"<html>Entry not found</html>",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        }[how]
    )


@pytest.mark.parametrize("how", ["cut", "half", "empty", "page", "pointer"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_damaged_files_are_named(kind, how, tmp_path):
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    state = {"w": torch.ones(500), "v": torch.zeros(3)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    damaged(path, how)
    reason = "is a Git LFS pointer" if how == "pointer" else r"is damaged or incomplete \(.+\): delete it and get it"
    with pytest.raises(ValueError, match=f"{path.name} {reason}"):
        open_weights(tmp_path)


def sharded(folder, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", 900)
    state = {f"w{i}": torch.full((100,), float(i)) for i in range(5)}
    save_weights(state, folder)
    index = folder / "model.safetensors.index.json"
    assert sorted(p.name for p in folder.glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    return state, index


def test_shards_are_read_one_at_a_time(tmp_path, monkeypatch):
    state, _ = sharded(tmp_path, monkeypatch)
    opened = open_weights(tmp_path)
    assert {n: t.clone() for n, t in opened.items()}.keys() == state.keys()
    for name in ("w4", "w0", "w4"):
        assert torch.equal(opened[name], state[name])


def test_a_broken_set_of_shards_is_named(tmp_path, monkeypatch):
    _, index = sharded(tmp_path, monkeypatch)
    good = index.read_text()
    index.write_text(good.replace('"w0":', '"lost":'))
    with pytest.raises(
        ValueError, match="index.json names tensors that their shards do not hold:\n  lost in model-00001"
    ):
        open_weights(tmp_path)
    index.write_text(good.replace("model-00002", "../model-00002"))
    with pytest.raises(ValueError, match="index.json names a shard outside its folder: '../model-00002"):
        open_weights(tmp_path)
    for text in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json is not an index of shards"):
            open_weights(tmp_path)
    index.write_text(good)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="index.json names 1 of 3 shards that are not there, .*: model-00002-of-00003"):
        open_weights(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no weights: none of model.safetensors, model.safetensors.index"):
        open_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="last.pt does not exist"):
        open_weights(tmp_path, pick="last.pt")


PEAK = """
import gc, json, sys, torch
from pathlib import Path
from torch import nn
from vlmamba.model.weights import load_into, open_weights

def status(key):  # KiB
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

def peak(folder, how, dtype):
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(12))
    weights = open_weights(folder)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    if how == "all at once":
        weights = {n: t.clone() for n, t in weights.items()}
    load_into(model, weights, folder, getattr(torch, dtype))
    return (status("VmHWM") - before) / 1024

peak(sys.argv[1], "lazily", "bfloat16")  # what torch sets up once
print(json.dumps([peak(*case.split(":")) for case in sys.argv[1:]]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to reset the peak of memory")
def test_peak_memory_is_the_model_and_one_shard(tmp_path, monkeypatch):
    """48 MiB in 4 shards of 12. Of a model in bfloat16, 24: reading all first would take 72, and two shards 48."""
    state = {f"{i}.weight": torch.ones(1024, 1024) for i in range(12)}
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", 12 * 2**20)
    (tmp_path / "safe").mkdir()
    save_weights(state, tmp_path / "safe")
    assert len(list((tmp_path / "safe").glob("model-*.safetensors"))) == 4
    shard_of = {name: f"pytorch_model-{i // 3}.bin" for i, name in enumerate(state)}
    (tmp_path / "pickle").mkdir()
    for shard in set(shard_of.values()):
        torch.save({n: t for n, t in state.items() if shard_of[n] == shard}, tmp_path / "pickle" / shard)
    (tmp_path / "pickle" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard_of}))

    cases = [f"{tmp_path / kind}:{how}" for kind in ("safe", "pickle") for how in ("lazily:float32", "lazily:bfloat16")]
    cases.append(f"{tmp_path / 'safe'}:all at once:bfloat16")
    script = PEAK.replace("peak(sys.argv[1], ", 'peak(sys.argv[1].split(":")[0], ')
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    run = subprocess.run([sys.executable, "-c", script, *cases], env=env, capture_output=True, text=True, check=True)
    *lazily, at_once = json.loads(run.stdout)
    slack = 4
    for got, model in zip(lazily, [48, 24, 48, 24], strict=True):
        assert model < got < model + 12 + slack
    assert at_once > 24 + 12 + slack
