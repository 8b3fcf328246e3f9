"""Weights in files, good and bad; and the Hub, by a small server that speaks as much of its language as is needed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from vlmamba.model import LMConfig, MambaLM, Tokenizer, weights
from vlmamba.model.formats.language import to_state_spaces
from vlmamba.model.hub import fetch

SHA = "0123456789" * 4


class Hub:
    """Repositories that a local server offers: name to file name to content."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.revisions = {"main", "v2"}
        self.requests: list[tuple[str, str | None]] = []
        self.cut_once: set[str] = set()
        self.down = False

    def downloads(self) -> list[str]:
        return [path.rsplit("/", 1)[-1] for path, _ in self.requests if "/resolve/" in path]

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path = handler.path.split("?")[0]
        if not path.startswith("/api/models/") and "/resolve/" not in path:
            return self._send(handler, 404, b"", body)
        if body:
            self.requests.append((path, handler.headers.get("Authorization")))
        if self.down:
            return self._send(handler, 503, b"", body)
        if path.startswith("/api/models/"):
            owner, name, kind, revision = path.removeprefix("/api/models/").split("/", 3)
            files = self.repos.get(f"{owner}/{name}")
            if files is None:
                return self._send(handler, 401, b"", body, {"X-Error-Code": "RepoNotFound"})
            if revision not in self.revisions | {SHA}:
                return self._send(handler, 404, b"", body, {"X-Error-Code": "RevisionNotFound"})
            if kind == "revision":
                answer = {"id": f"{owner}/{name}", "sha": SHA, "siblings": []}
            else:
                answer = [{"type": "file", "path": f, "size": len(c), "oid": _oid(f)} for f, c in files.items()]
            return self._send(handler, 200, json.dumps(answer).encode(), body)
        owner, name, _, _, file = path[1:].split("/", 4)
        if f"{owner}/{name}" in self.gated:
            return self._send(handler, 403, b"", body, {"X-Error-Code": "GatedRepo"})
        content = self.repos[f"{owner}/{name}"][file]
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = body and file in self.cut_once
        self.cut_once -= {file} if body else set()
        self._send(handler, 206 if start else 200, content[start:], body, headers, cut)

    def _send(self, handler, status, content, body, headers=None, cut=False) -> None:
        handler.send_response(status)
        for key, value in (headers or {}).items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if body:
            handler.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            handler.close_connection = True


def _oid(file: str) -> str:
    return f"{sum(file.encode()):040x}"


@pytest.fixture(scope="module")
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.hub.answer(self, True)

        def do_HEAD(self):
            self.server.hub.answer(self, False)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    server.hub = Hub()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    return server.hub


def files_of(lm: MambaLM, folder) -> dict[str, bytes]:
    lm.save_pretrained(folder)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def lm():
    torch.manual_seed(0)
    return MambaLM(LMConfig(16, 2, 300), Tokenizer.train(["a red circle"], 280))


IDS = torch.tensor([[1, 2, 3, 4]])


def test_a_model_is_loaded_by_name(hub, lm, tmp_path):
    hub.repos["me/lm"] = files_of(lm, tmp_path / "lm") | {"pytorch_model.bin": b"not wanted", "big.onnx": b"neither"}
    again = MambaLM.from_pretrained("me/lm", token="hf_secret")
    assert torch.equal(again(IDS).logits, lm(IDS).logits)
    assert again.tokenizer.encode("red") == lm.tokenizer.encode("red")
    small = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(hub.downloads()) == sorted([*small, "model.safetensors"])
    assert {token for _, token in hub.requests} == {"Bearer hf_secret"}
    hub.requests.clear()
    MambaLM.from_pretrained("me/lm")
    assert hub.downloads() == []
    MambaLM.from_pretrained("me/lm", force_download=True)
    assert {"config.json", "model.safetensors"} <= set(hub.downloads())
    hub.down = True  # and then what is cached does
    MambaLM.from_pretrained("me/lm")
    MambaLM.from_pretrained("me/lm", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="me/lm is not in the local cache, .* check HF_HOME and cache_dir"):
        MambaLM.from_pretrained("me/lm", local_files_only=True, cache_dir=tmp_path / "other")


def test_the_original_format_gets_the_tokenizer_of_neox(hub, lm, tmp_path, caplog):
    config = LMConfig(16, 1, 50277)
    torch.save(MambaLM(config).state_dict(), tmp_path / "pytorch_model.bin")
    hub.repos["state-spaces/mamba-tiny"] = {
        "config.json": json.dumps(to_state_spaces(config)).encode(),
        "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes(),
    }
    with caplog.at_level(logging.WARNING, logger="vlmamba"):
        assert MambaLM.from_pretrained("state-spaces/mamba-tiny").tokenizer is None
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("no tokenizer: that of EleutherAI/gpt-neox-20b could not be had")
    hub.repos["EleutherAI/gpt-neox-20b"] = files_of(lm, tmp_path / "lm")
    again = MambaLM.from_pretrained("state-spaces/mamba-tiny", revision="v2")
    assert again.config == config
    assert again.tokenizer.encode("red") == lm.tokenizer.encode("red")
    assert hub.downloads().count("model.safetensors") == 0


def test_shards_of_a_repository_are_all_downloaded(hub, lm, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", 15_000)
    files = files_of(lm, tmp_path / "lm")
    shards = [f for f in files if f.startswith("model-")]
    assert len(shards) > 1 and "model.safetensors.index.json" in files
    hub.repos["me/lm"] = files
    assert torch.equal(MambaLM.from_pretrained("me/lm")(IDS).logits, lm(IDS).logits)
    assert set(shards) <= set(hub.downloads())
    (next((tmp_path / "cache").rglob(shards[0]))).unlink()
    hub.down = True
    with pytest.raises((ValueError, OSError), match="me/lm|model.safetensors.index.json names 1 of"):
        MambaLM.from_pretrained("me/lm")


def test_an_interrupted_download_resumes(hub, tmp_path, lm):
    hub.repos["me/lm"] = files_of(lm, tmp_path / "lm")
    hub.cut_once = {"model.safetensors"}
    assert torch.equal(MambaLM.from_pretrained("me/lm")(IDS).logits, lm(IDS).logits)
    assert hub.downloads().count("model.safetensors") == 2


def test_a_repository_that_the_hub_lacks_is_named(hub, tmp_path):
    hub.repos |= {"me/lm": {"config.json": b"{}"}, "me/gated": {"config.json": b"{}"}}
    hub.gated.add("me/gated")
    with pytest.raises(
        FileNotFoundError, match="'me/none' is neither a folder nor a repository on the Hub that you may"
    ):
        fetch("me/none", ["*"])
    with pytest.raises(FileNotFoundError, match="me/lm has no revision 'v9': give a branch, a tag or a commit"):
        fetch("me/lm", ["*"], revision="v9")
    with pytest.raises(PermissionError, match="me/gated is gated: accept its terms at https://huggingface.co/me/gated"):
        fetch("me/gated", ["*"])
    with pytest.raises(FileNotFoundError, match="'a/b/c' is neither a folder nor a name of the form 'owner/model'"):
        fetch("a/b/c", ["*"])
    for path in ("./none", "~/none/at/all", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no folder at .*none"):
            fetch(path, ["*"])
    hub.down = True
    with pytest.raises(ConnectionError, match="the Hub cannot be reached, and me/lm is not in the local cache"):
        fetch("me/lm", ["*"])


def test_nobody_at_the_other_end(hub, monkeypatch):
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace(constants.ENDPOINT, "http://127.0.0.1:9"))
    with pytest.raises(ConnectionError, match="the Hub cannot be reached, and me/lm is not in the local cache"):
        fetch("me/lm", ["*"])


def test_hf_home_and_offline_mode_are_respected(lm, tmp_path):
    """A cache as the Hub's library lays it out, in a new process, since both are read when that is imported."""
    repo = tmp_path / "home" / "hub" / "models--me--lm"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v2").write_text(SHA)
    lm.save_pretrained(repo / "snapshots" / SHA)
    script = textwrap.dedent("""
        from vlmamba.model import MambaLM
        lm = MambaLM.from_pretrained("me/lm", revision="v2")
        print(sum(p.double().sum().item() for p in lm.parameters()), lm.tokenizer.vocab_size)
        try:
            MambaLM.from_pretrained("me/lm")
        except FileNotFoundError as e:
            print(e)
    """)
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    first, second = out.strip().splitlines()
    assert first == f"{sum(p.double().sum().item() for p in lm.parameters())} {lm.tokenizer.vocab_size}"
    assert "me/lm is not in the local cache" in second and "HF_HUB_OFFLINE" in second


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "lm"
    MambaLM(LMConfig(16, 3, 50)).save_pretrained(folder)
    return folder


def places(lm: MambaLM) -> dict[str, str]:
    return {name: p.device.type for name, p in lm.named_parameters()}


def test_device_map_of_one_device(saved):
    assert set(places(MambaLM.from_pretrained(saved, device_map="cpu")).values()) == {"cpu"}
    assert set(places(MambaLM.from_pretrained(saved, device_map=torch.device("meta"))).values()) == {"meta"}
    want = "cuda" if torch.cuda.is_available() else "cpu"
    assert set(places(MambaLM.from_pretrained(saved, device_map="auto")).values()) == {want}


def test_device_map_by_beginnings(saved):
    lm = MambaLM.from_pretrained(
        saved,
        device_map={"": "cpu", "backbone.layers": "meta", "backbone.layers.0": "cpu", "backbone.norm": "cpu"},
    )
    on_cpu = ("backbone.embedding", "backbone.layers.0.", "backbone.norm_f")  # `backbone.norm` is not `backbone.norm_f`
    for name, device in places(lm).items():
        assert device == ("cpu" if name.startswith(on_cpu) else "meta"), name


@pytest.mark.parametrize("layer", ["mamba", "mamba2"])
@torch.no_grad()
def test_a_model_on_two_devices_runs(layer, tmp_path, monkeypatch):
    """`meta` stands for the second: the ops refuse tensors of two devices, and it takes nothing back to the first."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # knows no meta
    MambaLM(LMConfig(16, 3, 50, layer, headdim=8, tie_embeddings=False)).save_pretrained(tmp_path)
    second = {"backbone.layers.2": "meta", "backbone.norm_f": "meta", "lm_head": "meta"}
    lm = MambaLM.from_pretrained(tmp_path, device_map={"": "cpu"} | second)
    assert lm(IDS).logits.device.type == "meta"
    state = lm.new_state(1)
    assert [s.ssm.device.type for s in state] == ["cpu", "cpu", "meta"]
    for ids in (IDS, IDS[:, :1]):
        assert lm(ids, state=state, logits_at=torch.tensor([0])).logits.shape == (1, 1, lm.config.padded_vocab_size)
    assert lm(IDS, cu_seqlens=torch.tensor([0, 1, 4])).logits.device.type == "meta"
    for device_map in ({"": "meta", "backbone.embedding": "cpu"}, {"": "cpu", "lm_head": "meta"}):
        lm = MambaLM.from_pretrained(tmp_path, device_map=device_map)
        assert lm(IDS).logits.device.type == "meta"


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"backbone": "cpu"}, None),
        ({"backbone.layers": "cpu"}, "device_map covers 'backbone.layers', but not the parameter backbone.embedding"),
        ({"backbone.layer": "cpu", "backbone.embedding": "cpu"}, "but not the parameter backbone.layers.0.norm.weight"),
        (
            {"": "cpu", "backbone.norm_f": "disk"},
            r"device_map\['backbone.norm_f'\] is 'disk': offloading to disk is not",
        ),
        ("disk", "device_map is 'disk': offloading to disk is not supported"),
        ("gpu", "device_map must be a device such as 'cpu' or 'cuda:0', got 'gpu'"),
        (
            {"": "cpu", "backbone.layers.1.mixer": "meta"},
            "device_map splits backbone.layers.1 over cpu, meta; give it one device",
        ),
    ],
)
def test_a_device_map_that_cannot_be_is_named(saved, device_map, message):
    if message is None:  # the head is tied to the embedding, and lies where that does
        MambaLM.from_pretrained(saved, device_map=device_map)
        return
    with pytest.raises(ValueError, match=message):
        MambaLM.from_pretrained(saved, device_map=device_map)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_a_dtype_that_cannot_be_is_named_before_anything_is_looked_up(dtype):
    with pytest.raises(ValueError, match="dtype must be a floating torch.dtype such as torch.bfloat16, or None, got"):
        MambaLM.from_pretrained("me/lm", dtype=dtype)
