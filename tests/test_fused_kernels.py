"""The fused kernels, each against PyTorch in float64: interpreted on a CPU, compiled on a CUDA device.

Triton takes the choice between the two when it is imported, so each file of them runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
COMPILED = pytest.param("0", id="compiled", marks=pytest.mark.gpu)


@pytest.mark.parametrize("interpret", [pytest.param("1", id="interpreted"), COMPILED])
def test_each_kernel_is_exact(interpret):
    run("kernel_checks.py", interpret)


def test_each_kernel_compiles():
    run("kernel_compiles.py", "0")


def run(tests: str, interpret: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / tests)]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
