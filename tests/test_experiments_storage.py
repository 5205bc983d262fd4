"""Files are whole or not there, nothing is overwritten, and one run at a time writes a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.config import SetupError
from experiments.kept import Found, KeptWork
from experiments.plan import Cell
from experiments.results import save_result
from experiments.storage import (
    SaveError,
    check_writable,
    folder_lock,
    hash_of,
    read_json,
    remove_leftovers,
    set_aside,
    write_atomically,
    write_json,
)

CELL = Cell("model", "text", "math", "streaming", "eager", 2, 14, "decode", 40, 0)
CONFIG = {"why": "not"}
HASH = hash_of(CONFIG)
RUN = {"perplexity": 1 / 3}


def save(store):
    store.save(CELL, CONFIG, Found(RUN, {"nll": np.ones(3, np.float32), "position": np.arange(3)}), 2.5)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match=r"a\.json.*No space"):
        write_atomically(path, fail)
    assert read_json(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_temporary_files_never_end_in_json(tmp_path):
    seen = []
    write_atomically(tmp_path / "a.json", lambda file: seen.extend(os.listdir(tmp_path)))
    assert len(seen) == 1
    assert not seen[0].endswith(".json")


def test_json_is_readable_exact_and_without_nan(tmp_path):
    value = {"third": 1 / 3, "range": [1, 2.5], "text": "[\n1,\n2]", "names": ["a", "b"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert '"range": [ 1, 2.5 ]' in (tmp_path / "a.json").read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_setting_aside_never_overwrites(tmp_path):
    for content in ("one", "two", "three"):
        (tmp_path / "a.json").write_text(content)
        set_aside(tmp_path / "a.json", "12345678")
    kept = {path.name: path.read_text() for path in (tmp_path / "superseded").iterdir()}
    assert kept == {"a.12345678.json": "one", "a.12345678-1.json": "two", "a.12345678-2.json": "three"}


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in (".a.json.123.partial", "sub/.b.npz.9.partial", "keep.partial", ".keep.json"):
        (tmp_path / name).write_text("x")
    assert remove_leftovers(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == [".keep.json", "keep.partial", "sub"]


def test_a_folder_that_another_process_holds_is_refused_and_free_after_its_death(tmp_path):
    lock = tmp_path / ".cells" / "lock"
    code = (
        "import sys, time; from pathlib import Path; from experiments.storage import folder_lock\n"
        f"with folder_lock(Path({str(lock)!r})):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SetupError, match=f"process {holder.pid}"), folder_lock(lock):
            pass
    finally:
        holder.kill()
        holder.wait()
    with folder_lock(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be written"):
        check_writable(tmp_path / "file" / "out", 1)
    with pytest.raises(SetupError, match="cannot be written"), folder_lock(tmp_path / "file" / "out" / "lock"):
        pass
    check_writable(tmp_path / "new" / "out", 1000)
    assert os.listdir(tmp_path / "new" / "out") == []


# --- cells -------------------------------------------------------------------------------------------------------


def test_a_cell_comes_back_exactly(tmp_path):
    store = KeptWork(tmp_path)
    save(store)
    found = store.load(CELL, HASH)
    assert found.values == RUN
    assert {name: array.tolist() for name, array in found.arrays.items()} == {"nll": [1, 1, 1], "position": [0, 1, 2]}
    assert store.earlier_times() == {CELL.kind: [2.5 / 40]}


def test_a_cell_of_another_configuration_is_not_there(tmp_path):
    store = KeptWork(tmp_path)
    save(store)
    assert store.load(CELL, "cd" * 32) is None
    same_name = HASH[:16] + "0" * 48  # the file's name holds a part of the hash only
    with pytest.raises(ValueError, match="not the record"):
        store.load(CELL, same_name)


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("content", [b"", b'{"schema": 3', b"PK\x03\x04 cut"])
def test_a_broken_cell_is_an_error_and_can_be_moved_away(tmp_path, suffix, content):
    store = KeptWork(tmp_path)
    save(store)
    store.path(CELL, HASH).with_suffix(suffix).write_bytes(content)
    with pytest.raises(ValueError, match=r"JSON|arrays"):
        store.load(CELL, HASH)
    said = []
    assert store.find(CELL, HASH, said.append) is None
    assert "superseded" in said[0]
    assert store.load(CELL, HASH) is None


def test_a_cell_without_its_losses_is_not_complete(tmp_path):
    store = KeptWork(tmp_path)
    save(store)
    store.path(CELL, HASH).with_suffix(".npz").unlink()
    with pytest.raises(ValueError, match="arrays"):
        store.load(CELL, HASH)


# --- result files ------------------------------------------------------------------------------------------------


def result(config_hash="a" * 64, **changes):
    return {"schema_version": 1, "config_hash": config_hash, "figure": 1, "timestamp": "then", **changes}


def test_saving_sets_aside_what_is_something_else(tmp_path):
    path = tmp_path / "x.json"
    assert save_result(path, result()).line.startswith("wrote: ")
    assert save_result(path, result(timestamp="now")).line.startswith("unchanged: ")
    assert read_json(path)["timestamp"] == "then"
    assert save_result(path, result(figure=2)).line.startswith("updated: ")
    assert save_result(path, result("b" * 64)).aside.name == "x.aaaaaaaa.json"
    assert read_json(tmp_path / "superseded" / "x.aaaaaaaa.json")["figure"] == 2
    assert save_result(path, result("b" * 64), keep_previous=True).aside.name == "x.bbbbbbbb.json"
    for foreign in ("{", '{"perplexity": 3}', "[]"):
        path.write_text(foreign)
        saved = save_result(path, result())
        assert saved.aside.read_text() == foreign
        assert str(saved.aside) in saved.line
        assert read_json(path) == result()
