"""Several ranks on one machine: the steps of one process, whatever the number; ends that all ranks agree on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
import tyro
import yaml
from packaging.version import Version
from torch.distributed.tensor import DTensor

from vlmamba.commands import COMMANDS
from vlmamba.model.batch import Sample, collate
from vlmamba.model.image_tokens import ProcessedImage
from vlmamba.model.prompt import IGNORE, IMAGE_TOKEN
from vlmamba.model.vlm import VLM
from vlmamba.train.config import StageConfig
from vlmamba.train.distributed import FRESH_STORE, blocks, processes, rank, recomputed_blocks, shard, sum_over_ranks
from vlmamba.train.loop import Interrupted, train_stage
from vlmamba.train.recipes import FAMILIES, tiny_config
from vlmamba.train.sampler import samples_of_step
from vlmamba.train.track import read_metrics

STAGE = StageConfig(
    "test", ("connector", "language_model"), lr=1e-3, batch_size=4, micro_batch_size=3, save_every=1,
    weight_decay=0.1, warmup_ratio=0,
)  # fmt: skip
VOCABULARY = 40


def on_ranks(n, function, *args):
    """Run `function(*args)` on n ranks, as `torchrun` would; gives their exit statuses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_as_rank, args=(r, n, port, function, args)) for r in range(n)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    for process in ranks:
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def _as_rank(r, n, port, function, args):
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test", "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_MAX_RESTARTS": "0",
    }  # fmt: skip
    with processes():
        function(*args)


def wait_and_press():
    """Ctrl-C comes to both ranks, of which one waits for the other."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    if rank() == 1:
        dist.barrier()
    time.sleep(30)


def test_ctrl_c_between_stages_ends_a_rank_that_waits_for_another():
    assert on_ranks(2, wait_and_press) == [-signal.SIGINT] * 2


def tiny(family, seed=0):
    torch.manual_seed(seed)
    return VLM(tiny_config(family, VOCABULARY))


def samples(n=12):
    """Conversations of unequal length, the first about images and the second about none, and so on."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for i in range(n):
        ids = torch.randint(0, VOCABULARY, (5 + 2 * i,), generator=draw).tolist()
        image = () if i % 2 else (ProcessedImage((torch.randn(1, 3, 48, 48, generator=draw),), 36),)
        places = [] if i % 2 else [IMAGE_TOKEN] * 36
        made.append(Sample(places + ids, [IGNORE] * (len(places) + 2) + ids[2:], image))
    return made


def train(folder, family, stage=STAGE, on_step=None, model=None):
    model = tiny(family) if model is None else model
    train_stage(model, stage, samples(), collate, folder, on_step=on_step)
    if rank() == 0:
        torch.save(model.state_dict(), folder / "model.pt")


def curve(folder):
    return [(m["loss"], m["grad_norm"]) for m in read_metrics(folder)]


def assert_same_training(one, other, rtol=1e-5):
    torch.testing.assert_close(torch.tensor(curve(one)), torch.tensor(curve(other)), rtol=rtol, atol=0)
    weights = [torch.load(f / "model.pt", weights_only=True) for f in (one, other)]
    # AdamW makes a full step of the smallest gradient, of which rounding is a large part.
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_take_the_steps_of_one(family, tmp_path):
    train(tmp_path / "one", family)
    assert on_ranks(2, train, tmp_path / "two", family, replace(STAGE, micro_batch_size=1)) == [0, 0]
    assert_same_training(tmp_path / "one", tmp_path / "two")
    start = tiny(family).state_dict()
    learned = torch.load(tmp_path / "two" / "model.pt", weights_only=True)
    changed = {n.split(".")[0] for n in start if not torch.equal(start[n], learned[n])}
    assert changed == {"connector", "language_model"}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_that_split_each_batch_take_the_steps_of_one(family, tmp_path):
    train(tmp_path / "one", family)
    stage = replace(STAGE, context_parallel=2, gradient_checkpointing=family == "ml-mamba")
    assert on_ranks(2, train, tmp_path / "two", family, stage) == [0, 0]
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_four_ranks_split_batches_in_pairs(tmp_path):
    train(tmp_path / "one", "ml-mamba")
    assert on_ranks(4, train, tmp_path / "four", "ml-mamba", replace(STAGE, context_parallel=2)) == [0] * 4
    assert_same_training(tmp_path / "one", tmp_path / "four")


def test_a_split_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="context_parallel must divide the 1 ranks, got 2"):
        train(tmp_path, "ml-mamba", replace(STAGE, context_parallel=2))


def test_checkpoints_of_two_ranks_resume_on_one_and_on_four(tmp_path):
    train(tmp_path / "whole", "ml-mamba")
    assert on_ranks(2, stopped_after_a_step, tmp_path / "4") == [143, 143]
    saved = {p.relative_to(tmp_path / "4"): p.read_bytes() for p in (tmp_path / "4").rglob("*") if p.is_file()}
    for path, content in saved.items():
        (tmp_path / "1" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "1" / path).write_bytes(content)
    train(tmp_path / "1", "ml-mamba")
    assert on_ranks(4, train, tmp_path / "4", "ml-mamba") == [0] * 4
    for resumed in ("1", "4"):
        assert_same_training(tmp_path / "whole", tmp_path / resumed)


def stopped_after_a_step(folder):
    """SIGTERM comes to rank 1 alone."""

    def stop(step, model):
        if step == 0 and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stage = replace(STAGE, save_every=100)
    try:
        train(folder, "ml-mamba", stage, on_step=stop)
    except Interrupted:
        assert len(list(folder.glob("step-*/checkpoint.json"))) == 1
        raise


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_shared_and_those_of_the_scan_are_whole_in_float32(family):
    assert on_ranks(2, check_shards, family) == [0, 0]


def check_shards(family):
    with torch.device("meta" if rank() else "cpu"):
        model = tiny(family)
    if rank() == 0:  # as it came from its file
        model.vision.bfloat16()
    model.vision.requires_grad_(False)
    sharded = shard(model, torch.device("cpu"), "bf16")
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in sharded.parameters())
    assert held < 0.55 * sum(p.numel() for p in model.parameters())
    whole = {n.split(".")[-1] for n, p in sharded.named_parameters() if not isinstance(p, DTensor)}
    assert (
        {"A_log", "D"}
        <= whole
        <= {"A_log", "D", "A_logs", "Ds", "dt_bias", "dt_projs_bias", "bias"}
        | {name + suffix for name in ("A_log", "D", "dt_bias") for suffix in ("_b", "_c", "_cb")}
    )
    seen = {}

    def look(mixer, args, output):
        seen["weight"], seen["A_log"] = mixer.in_proj.weight.dtype, mixer.A_log.dtype
        seen["weight is whole"] = not isinstance(mixer.in_proj.weight, DTensor)

    layer = sharded.language_model.backbone.layers[1]
    layer.mixer.register_forward_hook(look)
    layer.register_forward_hook(lambda layer, args, output: seen.update(residual=output[1].dtype))
    # Rank 1 has no image: it must run the encoder all the same, or rank 0 would wait.
    with torch.autocast("cpu", torch.bfloat16):
        loss = sharded(collate(samples(2)[rank() : rank() + 1])).loss
    loss.backward()
    assert seen == {
        "weight": torch.bfloat16, "A_log": torch.float32, "weight is whole": True, "residual": torch.float32,
    }  # fmt: skip
    gradients = {n: p.grad for n, p in sharded.named_parameters()}
    assert all((g is None) == n.startswith("vision.") for n, g in gradients.items())
    assert {g.dtype for g in gradients.values() if g is not None} == {torch.float32}
    assert sum_over_ranks(1.0, rank()) == [2.0, 1.0]


def test_a_pytorch_that_sums_where_it_should_average_is_refused():
    assert on_ranks(2, shard_where_averages_are_sums) == [0, 0]


def shard_where_averages_are_sums():
    """Make averages sums, which they are in torch 2.8 with gloo."""
    torch.distributed.ReduceOp.AVG = torch.distributed.ReduceOp.SUM
    message = (
        rf"averaged over 2 ranks: their average is 1.5, and torch {re.escape(torch.__version__)} on cpu computes \[3.0"
    )
    with pytest.raises(RuntimeError, match=message):
        shard(tiny(FAMILIES[0]), torch.device("cpu"), "fp32")


def test_ranks_with_different_models_are_an_error():
    assert on_ranks(2, shard_different_models) == [0, 0]


def shard_different_models():
    family = FAMILIES[rank()]
    with contextlib.nullcontext() if rank() == 0 else pytest.raises(ValueError, match="rank 1 is not that of rank 0: "):
        try:
            shard(tiny(family), torch.device("cpu"), "fp32")
        except RuntimeError:  # rank 0 loses the other
            assert rank() == 0


def test_bfloat16_on_two_ranks_is_that_of_one(tmp_path):
    stage = replace(STAGE, precision="bf16", gradient_checkpointing=True)
    train(tmp_path / "one", "vl-mamba", stage)
    assert on_ranks(2, train, tmp_path / "two", "vl-mamba", stage) == [0, 0]
    torch.testing.assert_close(
        torch.tensor(curve(tmp_path / "one")), torch.tensor(curve(tmp_path / "two")), rtol=0.02, atol=0
    )


def test_a_loss_that_is_not_a_number_stops_every_rank(tmp_path):
    assert on_ranks(2, train_to_nan, tmp_path) == [0, 0]
    assert not list(tmp_path.glob("step-*"))


def test_data_that_fail_on_one_rank_end_all_after_a_checkpoint(tmp_path):
    assert on_ranks(2, train_until_data_fail, tmp_path) == [0, 0]
    assert (tmp_path / "step-00000002" / "checkpoint.json").exists()


def train_until_data_fail(folder):
    made = samples()
    stage = replace(STAGE, save_every=100, epochs=2)
    broken = samples_of_step(len(made), stage.batch_size, stage.seed, 2)[1::2]  # of rank 1

    class Failing(list):
        def __getitem__(self, i):
            if i in broken and probed:
                raise ValueError("file has changed")
            return super().__getitem__(i)

    probed = []
    data = Failing(made)
    expected = "file has changed" if rank() else "another rank has no data"
    with pytest.raises(ValueError if rank() else OSError, match=expected):
        train_stage(tiny("ml-mamba"), stage, data, collate, folder, on_step=lambda step, model: probed.append(step))


class NanOnRank1(VLM):
    def forward(self, batch):
        out = super().forward(batch)
        return out._replace(loss=out.loss * torch.nan) if rank() else out


def train_to_nan(folder):
    torch.manual_seed(0)
    model = NanOnRank1(tiny_config("ml-mamba", VOCABULARY))
    with pytest.raises(FloatingPointError, match=f"has a loss of nan .*bad-batch-{rank()}.pt"):
        train(folder, None, model=model)
    assert (folder / f"bad-batch-{rank()}.pt").exists()


def test_an_image_that_is_not_a_number_stops_and_keeps_the_batch(tmp_path):
    made = samples()
    made[0].images[0].pixels[0].fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="met a non-finite value"):
        train_stage(tiny("ml-mamba"), STAGE, made, collate, tmp_path)
    assert torch.load(tmp_path / "bad-batch-0.pt", weights_only=True)["images"][0].isnan().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_computed_again_give_the_same_gradients(family):
    model, batch = tiny(family), collate(samples(4))
    gradients, kept = [], []
    for again in (False, True):
        sizes = []

        def count(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            if again:
                with recomputed_blocks(model):
                    model(batch).loss.backward()
            else:
                model(batch).loss.backward()
        kept.append(sum(sizes))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert kept[1] < 0.5 * kept[0]
    assert not any("forward" in vars(m) for m in model.modules())
    assert len(blocks(model)) >= 2 + 3


SCRIPT = textwrap.dedent("""
    import importlib.util, os, signal, sys
    from pathlib import Path
    spec = importlib.util.spec_from_file_location("test_distributed", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    sys.modules["test_distributed"] = module
    spec.loader.exec_module(module)
    folder = Path(sys.argv[2])

    def die(step, model):
        if step == 1 and module.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    with module.processes():
        module.train(folder, "ml-mamba", on_step=die)
""")


@pytest.mark.slow
def test_a_rank_that_is_killed_comes_back_and_the_curve_is_the_same(tmp_path):
    assert on_ranks(2, train, tmp_path / "whole", "ml-mamba") == [0, 0]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
         str(script), __file__, str(tmp_path / "killed")],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1", FRESH_STORE: "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


@pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torchrun of 2.9 has no --shutdown-timeout")
def test_the_files_for_clusters_run_the_command_of_the_laptop():
    folder = Path(__file__).parents[2] / "docs" / "cluster"
    job = yaml.safe_load((folder / "pytorchjob.yaml").read_text())
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    lines = [(folder / name).read_text().replace("\\\n", " ") for name in ("train.sbatch", "README.md")]
    launches = [container["command"]] + [shlex.split(x) for t in lines for x in t.splitlines() if "vlmamba train" in x]
    commands = {tuple(launch[launch.index("vlmamba") + 1 :]) for launch in launches}
    assert len(launches) == 4 and len(commands) == 1
    train = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=list(commands.pop()))
    assert (train.model, train.stage) == ("vl-mamba", "both")
    for launch in launches:
        options = launch[launch.index("torchrun") + 1 : launch.index("vlmamba") + 1] if "torchrun" in launch else ["x"]
        torch.distributed.run.get_args_parser().parse_args(options)
    assert {"name": FRESH_STORE, "value": "1"} in container["env"]
    assert all(f"{FRESH_STORE}=1" in text for text in lines)
