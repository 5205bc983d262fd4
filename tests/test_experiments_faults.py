"""Faults, for real: killed at random moments, a full disk, an error from inside a layer, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "experiments" / "run_final_experiments.py"

pytestmark = pytest.mark.usefixtures("no_collection")


def command(world, output: Path, *options: str) -> list[str]:
    return [
        sys.executable, str(SCRIPT), "--model", str(world.model), "--datasets", str(world.texts[0]),
        "--n-sink", "2", "--window-size", "14", "--max-eval-tokens", "200", "--methods", "baseline", "streaming",
        "--attn-backend-list", "math", "flash", "--repeats", "2", "--ablation-tokens", "100", "--device", "cpu",
        "--ablation-window-sizes", "8", "16", "--ablation-n-sinks", "0", "2", "--output-dir", str(output), *options,
    ]  # fmt: skip


def environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(world, output: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(world, output, *options), capture_output=True, text=True, env=environment())


def substance(output: Path) -> dict:
    """Perplexities and statuses of every result file, and the losses of every cell."""
    found = {}
    for path in sorted(output.glob("tiny/*/*.json")):
        value = json.loads(path.read_text())
        blocks = [value[name] for name in value.get("methods", [])] + value.get("results", [value])
        found[path.name] = [(b.get("perplexity"), b.get("status"), len(b.get("runs", []))) for b in blocks]
    for path in sorted(output.glob(".cells/tiny/*.npz")):
        with np.load(path) as arrays:
            found[path.name] = arrays["nll"].tolist()
    return found


def finished_cells(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob(".cells/tiny/*.json")}


def kill_while_running(words: list[str], delay_sec: float) -> bool:
    """Start a run, kill it some time after it began with its cells; whether it was finished before that."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(), bufsize=1
    )
    next((line for line in process.stdout if line.startswith(("reused", "["))), None)
    time.sleep(delay_sec)
    finished = process.poll() == 0
    process.kill()
    process.communicate()
    return finished


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments_the_result_is_that_of_one_run(world):
    whole, killed = world.base / "whole", world.base / "killed"
    assert run(world, whole).returncode == 0
    chance = random.Random(4)
    kills = 0
    while kills < 20:
        before = finished_cells(killed)
        finished_first = kill_while_running(command(world, killed), chance.uniform(0, 0.5))
        kills += not finished_first
        for path in killed.rglob("*.json"):  # no file is half-written
            json.loads(path.read_text())
        after = finished_cells(killed)
        assert {name: after.get(name) for name in before} == before  # what was finished is kept and not run again
        if finished_first:  # go on killing, with the last third still to do
            for path in sorted(killed.glob(".cells/tiny/*.json"))[::3]:
                path.unlink()
    last = run(world, killed)
    assert last.returncode == 0
    assert substance(killed) == substance(whole)
    assert not list(killed.rglob("*.partial"))
    assert not list(killed.rglob("superseded"))


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_says_what_is_left(world, ctrl_c):
    output = world.base / "out"
    process = subprocess.Popen(
        command(world, output, "--max-eval-tokens", "2000"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("[1/"):
            process.send_signal(signal.SIGINT)
            break
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "cells are finished and kept" in rest
    assert "left: one | " in rest
    assert "Traceback" not in error
    assert not list(output.rglob("*.partial"))


def test_an_error_from_inside_a_layer_fails_that_cell_only(world, monkeypatch):
    import torch

    from experiments.measuring import Bench

    original = Bench.measure

    def measure(self, task, display):
        cell, layer = task.cell, self._loaded.model.gpt_neox.layers[1]
        layer.__dict__.pop("forward", None)
        if cell.method == "streaming" and cell.backend == "flash":
            calls = []

            def forward(*args, **kwargs):
                calls.append(1)
                if len(calls) > 9:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
                return type(layer).forward(layer, *args, **kwargs)

            layer.forward = forward
        return original(self, task, display)

    monkeypatch.setattr(Bench, "measure", measure)
    backends = ["math", "flash"]
    assert world.run(attn_backend_list=backends).exit_code == 1
    states = {}
    for backend in backends:
        value = world.result(f"final/one_main_backend-{backend}.json")
        states |= {(name, backend): value[name]["status"] for name in value["methods"]}
        for name in value["methods"]:
            if value[name]["status"] == "failed":
                assert value[name]["reason"].startswith("out of memory: CUDA out of memory")
    assert states == {
        ("baseline", "math"): "ok", ("streaming", "math"): "ok",
        ("baseline", "flash"): "ok", ("streaming", "flash"): "failed",
    }  # fmt: skip


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of the given size on `folder`; skips where this process may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_found_before_computing(world):
    from experiments.config import SetupError

    disk = world.base / "disk"
    with small_disk(disk, "256k"):
        (disk / "filler").write_bytes(bytes(200_000))
        world.output = disk / "out"
        with pytest.raises(SetupError, match=r"cannot be written.*No space"):
            world.run()
        assert not list(disk.rglob("*.json"))


def test_a_disk_that_fills_up_while_running_is_fatal_and_leaves_whole_files(world, monkeypatch):
    from experiments.kept import KeptWork
    from experiments.storage import SaveError

    disk = world.base / "disk"
    with small_disk(disk, "2m"):
        world.output = disk / "out"
        original = KeptWork.save
        saved = []

        def save(self, cell, config, found, wall_sec):
            if saved:  # before the second cell is kept, the disk is full
                with contextlib.suppress(OSError):
                    (disk / "filler").write_bytes(bytes(4_000_000))
            original(self, cell, config, found, wall_sec)
            saved.append(cell)

        monkeypatch.setattr(KeptWork, "save", save)
        with pytest.raises(SaveError, match="No space"):
            world.run()
        assert len(saved) == 1
        assert not list(disk.rglob("*.partial"))
        for path in disk.rglob("*.json"):
            json.loads(path.read_text())
        (disk / "filler").unlink()
        monkeypatch.setattr(KeptWork, "save", original)
        world.run()
        assert len(world.lines("reused: ")) == 1
        assert world.result()["status"] == "ok"
