"""What a result depends on besides its configuration: versions, device, threads, the project's own sources."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from experiments.kvpress_support import kvpress_version

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("streaming_llm/**/*.py", "personal_adapters/**/*.py", "experiments/*.py")
_DRAWING = ("plot_", "make_report")  # reads results, and cannot change one


@functools.cache
def sources_hash(*patterns: str) -> str:
    """SHA-256 over the project's sources that match; without patterns, over all that could change a figure."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns or _SOURCES for path in ROOT.glob(pattern)):
        if not path.name.startswith(_DRAWING):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()} ({device.type})"


@functools.cache
def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
        if name:
            return name
    return platform.processor() or platform.machine()


def what_matters(device: torch.device) -> dict:
    """What could change a figure on this machine, as JSON values; part of every `config_hash`."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "sources": sources_hash(),
    }


def environment(device: torch.device, command: str, seed: int) -> dict:
    """The record of where a result was measured: what is needed to reproduce it."""
    head, dirty = commit()
    return what_matters(device) | {
        "kvpress": kvpress_version(),
        "kvpress_imported": "before the first cell; its attention functions in force in its own cells only"
        if "kvpress" in sys.modules
        else "no",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "platform": platform.platform(),
        "commit": head,
        "dirty": dirty,
        "command": command,
        "seed": seed,
    }


def commit() -> tuple[str | None, bool | None]:
    """The checkout's commit and whether tracked files differ from it.

    Outside a git checkout the commit is what the variable GIT_COMMIT says, and whether files differ is not known.
    """
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head:
        return os.environ.get("GIT_COMMIT"), None
    return head, bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"))


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
