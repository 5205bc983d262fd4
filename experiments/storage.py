"""Files that are whole or not there: atomic writing, a lock on the results folder, and nothing ever overwritten.

A file is written under a temporary name (which never ends in .json) in the folder where it will be, brought to the
disk, and renamed. A process that is killed leaves at most a temporary file, which the next run removes.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from experiments.config import SetupError

# A list of numbers alone, which is easier to read on one line. No string matches: its line breaks are escaped.
_NUMBER_LIST = re.compile(r"\[\n[\s\d.,eE+-]+\]")
TEMPORARY_SUFFIX = ".partial"
SUPERSEDED = "superseded"


def hash_of(value: dict) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(theirs: dict, ours: dict) -> str:
    """What differs between the conditions of two runs, "" if nothing does."""
    differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return "; ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} now" for key in differing)


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class SaveError(RuntimeError):
    """A result could not be saved; always fatal."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill `path`; raises SaveError, and leaves `path` as it was, where that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some file systems cannot; the file itself is on the disk
                os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object atomically; NaN and infinities are refused with ValueError: JSON has none."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    text = _NUMBER_LIST.sub(lambda match: " ".join(match.group().split()), text)
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays atomically as a compressed .npz."""
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def read_json(path: Path) -> dict:
    """A JSON object; raises ValueError that says what is wrong with the file, OSError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def set_aside(path: Path, why: str) -> Path:
    """Move a file into `superseded/` beside it, under a name that is free there; returns where it is now."""
    folder = path.parent / SUPERSEDED
    try:
        folder.mkdir(exist_ok=True)
        for number in range(10_000):
            target = folder / f"{path.stem}.{why}{f'-{number}' if number else ''}{path.suffix}"
            if not target.exists():
                os.replace(path, target)
                return target
    except OSError as error:
        raise SaveError(f"cannot move {path} to {folder}: {error.strerror or error}") from error
    raise SaveError(f"cannot move {path}: {folder} holds too many files of this name")


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files that a killed run left in a folder of results; call it under the lock only."""
    leftovers = list(folder.rglob(f".*{TEMPORARY_SUFFIX}")) if folder.is_dir() else []
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _holder(path: Path) -> str:
    try:
        content = read_json(path)
        return f"process {content['pid']} on {content['host']}"
    except (ValueError, KeyError, OSError):
        return "another process"


@contextmanager
def folder_lock(path: Path, name: str = "") -> Iterator[None]:
    """Hold the results folder for this process; raises SetupError, which calls it `name`, where another holds it.

    The system releases the lock when its holder ends, however it ends. Two runs at once would also falsify each
    other's timings.
    """
    name = name or f"output folder {path.parent.parent}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise SetupError(f"{name}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SetupError(
                f"{name}: {_holder(path)} is writing its results there; wait for it, or choose another"
            ) from None
        try:
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
        except OSError as error:
            raise SetupError(f"{name}: cannot be written ({error.strerror})") from None
        yield


def check_writable(folder: Path | None, nbytes: int) -> None:
    """Make sure, by writing them, that `nbytes` fit into the folder, if there is one; raises SetupError."""
    if folder is None:
        return
    probe = folder / f".probe.{os.getpid()}{TEMPORARY_SUFFIX}"
    try:
        write_atomically(probe, lambda file: file.write(os.urandom(nbytes)))
        probe.unlink()
    except SaveError as error:
        reason = getattr(error.__cause__, "strerror", None) or error.__cause__
        raise SetupError(f"output folder {folder}: cannot be written ({reason})") from None
