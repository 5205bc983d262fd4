"""Cells by Ray: the same results as in one process, whatever dies; on a cluster of this machine's loopback address."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from evaluation_support import World, make_model_folder

from experiments.config import ExperimentConfig, SetupError
from experiments.models import find_model

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when ray is imported: loopback address only
Cluster = pytest.importorskip("ray.cluster_utils").Cluster

from experiments.ray_executor import share_of_a_cell  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MATRIX = {"methods": ["baseline", "streaming"], "attn_backend_list": ["math", "flash"], "only": "main"}
LONG = {**MATRIX, "max_eval_tokens": 600, "repeats": 2}  # cells that are long enough to be killed in the middle
pytestmark = pytest.mark.usefixtures("no_collection")


@pytest.fixture(scope="module")
def cluster():
    """A head node with two cores."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def world(tmp_path, cluster):
    world = World(tmp_path)
    config = world.config
    world.config = lambda **changes: config(**{"launcher": "ray", "ray_address": cluster.address, **changes})
    return world


def perplexities(folder: Path) -> dict:
    """By file, and by method or entry: perplexities of all runs."""
    found = {}
    for path in sorted(folder.glob("final/*.json")):
        value = json.loads(path.read_text())
        blocks = (
            {name: value[name] for name in value["methods"]}
            if "methods" in value
            else dict(enumerate(value["results"]))
        )
        found |= {(path.name, name): [run["perplexity"] for run in block["runs"]] for name, block in blocks.items()}
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def workers_in_a_cell() -> list[int]:
    """Process ids of this test's workers (not those of another run on this machine) that are measuring now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            pid = int(path.parent.name)
            if path.read_bytes().startswith(b"ray::Worker.measure") and parent(parent(pid)) == os.getpid():
                found.append(pid)  # a worker is a child of its raylet, which is one of the cluster's process
        except OSError:  # it has ended
            continue
    return found


class Meanwhile(threading.Thread):
    """Does something once, shortly after a cell has begun to be measured."""

    def __init__(self, act):
        super().__init__(daemon=True)
        self.act, self.done = act, threading.Event()
        self.start()

    def run(self):
        while not (pids := workers_in_a_cell()):
            time.sleep(0.01)
        time.sleep(0.2)
        self.act(pids)
        self.done.set()


def kill_one(pids: list[int]) -> None:
    os.kill(pids[0], signal.SIGKILL)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    """What one process gives of `LONG`."""
    world = World(tmp_path_factory.mktemp("one_process"))
    world.run(**LONG)
    return perplexities(world.root)


def test_the_cluster_listens_on_the_loopback_address_only(cluster):
    assert cluster.address.startswith("127.0.0.1:")


def test_two_workers_give_what_one_process_gives(world, tmp_path):
    options = {"repeats": 2, "datasets": [str(path) for path in world.texts], **MATRIX}
    options["only"] = ["main", "ablation_window_size"]
    other = make_model_folder(tmp_path / "other", seed=5)
    options["model"] = [str(world.model), str(other)]
    summary = world.run(**options)
    assert summary.exit_code == 0
    assert any(
        line.startswith("ray on 127.0.0.1:") and "2 workers with 1 CPU cores each" in line for line in world.said
    )
    assert len(world.lines("[")) == 2 * (2 * 2 * 2 * 2 + 2 * 2 * 2)
    world.run(**options, launcher="local", output_dir=tmp_path / "local")
    for name in ("tiny", "other"):
        assert perplexities(world.output / name) == perplexities(tmp_path / "local" / name)
        assert len(perplexities(world.output / name)) == 2 * 2 * 2 + 2 * 2
    value = world.result()
    assert value["environment"]["launcher"] == "ray"
    assert value["environment"]["commit"]
    world.run(**options)
    assert not world.lines("[")
    assert len(world.lines("reused: ")) == 2 * (2 * 2 * 2 * 2 + 2 * 2 * 2)


def test_a_worker_that_is_killed_in_a_cell_loses_nothing(world, expected):
    killer = Meanwhile(kill_one)
    summary = world.run(**LONG)
    assert killer.done.is_set()
    assert summary.exit_code == 0
    assert perplexities(world.root) == expected
    assert len(world.lines("[")) == len(set(world.lines("["))) == 8


@pytest.mark.slow
def test_a_cell_whose_worker_always_dies_has_failed_and_says_why(world):
    killer = Meanwhile(kill_one)
    summary = world.run(**LONG, retries=0)
    assert killer.done.is_set()
    assert summary.exit_code == 1
    (model,) = summary.outcomes.values()
    assert 1 <= len(model.failed) <= 2  # and its repeat, which is not tried
    assert all("its worker died 1 times" in reason for reason in model.failed.values())
    assert len(model.done) + len(model.failed) == 8
    assert world.run(**LONG).exit_code == 0
    assert len(world.lines("reused: ")) == len(model.done)


@pytest.mark.slow
def test_a_node_that_leaves_loses_nothing(world, expected, cluster):
    node = cluster.add_node(num_cpus=1)

    def remove(pids):
        while len(workers_in_a_cell()) < 3:  # until one of the second node is at work, too
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)

    leaving = Meanwhile(remove)
    summary = world.run(**{**LONG, "repeats": 4})
    assert leaving.done.is_set()
    assert summary.exit_code == 0
    found = perplexities(world.root)
    assert {key: runs[:2] for key, runs in found.items()} == expected
    assert all(len(runs) == 4 and len(set(runs)) == 1 for runs in found.values())


def command(world, cluster, output: Path) -> list[str]:
    return [
        sys.executable, str(ROOT / "experiments" / "run_final_experiments.py"), "--model", str(world.model),
        "--datasets", str(world.texts[0]), "--n-sink", "2", "--window-size", "14", "--max-eval-tokens", "600",
        "--methods", "baseline", "streaming", "--attn-backend-list", "math", "flash", "--only", "main",
        "--repeats", "2", "--device", "cpu", "--output-dir", str(output), "--launcher", "ray",
        "--ray-address", cluster.address,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_driver_that_is_stopped_goes_on_where_it_was(world, expected, cluster, ctrl_c, how, code):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = command(world, cluster, world.output)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("[") and len([line for line in lines if line.startswith("[")]) == 3:
            process.send_signal(how)
            break
    rest, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert how == signal.SIGKILL or "cells are finished and kept" in rest
    kept = len(list(world.output.glob(".cells/tiny/*.json")))
    assert 3 <= kept < 8
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reused: ") == kept
    assert not list(world.output.rglob("*.partial"))
    assert perplexities(world.root) == expected


# --- what is wrong before computing ------------------------------------------------------------------------------


def test_a_cluster_that_is_not_there_is_one_line(world):
    for address in ("127.0.0.1:1", "nowhere"):
        with pytest.raises(SetupError, match=f"^--launcher ray: no cluster at --ray-address {address}") as caught:
            world.run(ray_address=address)
        assert "\n" not in str(caught.value)


def test_a_folder_that_a_node_lacks_is_an_error_that_says_so(world, tmp_path):
    import torch

    source = find_model(str(make_model_folder(tmp_path / "moved")))
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    with pytest.raises(SetupError, match=r"there is no folder .*moved on .*; copy it there"):
        source.load(torch.float32, torch.device("cpu"))
    make_model_folder(tmp_path / "moved", seed=3)
    with pytest.raises(SetupError, match=r"the files in .*moved on .* are not those of the model"):
        source.load(torch.float32, torch.device("cpu"))


H100 = {"CPU": 16, "GPU": 8, "accelerator_type:H100": 1, "node:10.0.0.1": 1}
A100 = {"CPU": 16, "GPU": 4, "accelerator_type:A100": 1}
CPUS = {"CPU": 64}


@pytest.mark.parametrize(
    ("options", "nodes", "share"),
    [
        ({}, [H100, CPUS], {"num_cpus": 1, "num_gpus": 1}),
        ({"gpu_type": "A100"}, [H100, A100], {"num_cpus": 1, "num_gpus": 1, "accelerator_type": "A100"}),
        ({"gpus_per_cell": 2.0, "device_map": "auto"}, [H100], {"num_cpus": 1, "num_gpus": 2}),
        (
            {"gpus_per_cell": 0.25, "scoring": "parallel", "decode_sample": 0},
            [H100],
            {"num_cpus": 1, "num_gpus": 0.25},
        ),
        ({"device": "cpu", "cpus_per_cell": 4}, [H100, A100], {"num_cpus": 4, "num_gpus": 0}),
        ({"cpus_per_cell": 3}, [CPUS], {"num_cpus": 3, "num_gpus": 0}),
    ],
)
def test_what_a_cell_takes(options, nodes, share):
    config = ExperimentConfig(launcher="ray", **options)
    assert share_of_a_cell(config, nodes, config.device != "cpu" and nodes != [CPUS]) == share


@pytest.mark.parametrize(
    ("options", "nodes", "words"),
    [
        ({}, [H100, A100], r"several kinds: choose one with --gpu-type \(A100, H100\)"),
        ({"gpu_type": "V100"}, [H100], "unknown --gpu-type 'V100'.*H100"),
        ({"gpus_per_cell": 0.5}, [H100], "--gpus-per-cell 0.5: cells that measure time"),
        ({"gpus_per_cell": 0.5, "scoring": "parallel"}, [H100], "--decode-sample 0"),
        ({"gpus_per_cell": 1.5}, [H100], "a fraction of one GPU or a whole number"),
        ({"gpus_per_cell": 2.0}, [H100], "--device-map auto"),
        ({"device": "cuda:1"}, [H100], "Ray assigns the GPUs"),
        ({"device": "cuda"}, [CPUS], "has no GPU"),
        ({"gpu_type": "H100"}, [CPUS], "no cell runs on a GPU"),
    ],
)
def test_what_a_cell_cannot_take(options, nodes, words):
    config = ExperimentConfig(launcher="ray", **options)
    with pytest.raises(SetupError, match=words):
        share_of_a_cell(config, nodes, nodes != [CPUS])
