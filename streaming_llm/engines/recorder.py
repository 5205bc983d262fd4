"""CUDA graphs: a sequence of kernels recorded once and launched as one, so that Python costs nothing per step.

This is the one place in which graphs are recorded and replayed, with their device current.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WARM_UP = 3
"""Calls before recording: kernels are compiled and tuned, and libraries take their workspaces."""


class Recording:
    """What ``call`` launches on one device, recorded after some calls on a side stream, as CUDA asks for.

    Args:
        call: launches kernels on the current stream of ``device`` without waiting for it. It runs ``WARM_UP + 1``
            times.
        device: a CUDA device, on which all that ``call`` uses lies.
        generator: a generator whose random numbers ``call`` draws, if not the default one.
    """

    def __init__(
        self, call: Callable[[], object], device: torch.device, *, generator: torch.Generator | None = None
    ) -> None:
        self.device = device
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            # Kernels of the first stream go before those that run beside them on others, and fill the gaps.
            side = torch.cuda.Stream(device, priority=-1)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    call()
            torch.cuda.current_stream(device).wait_stream(side)
            torch.cuda.synchronize(device)
            self._graph = torch.cuda.CUDAGraph()
            if generator is not None:
                self._graph.register_generator_state(generator)
            with _no_garbage_collection(), torch.cuda.graph(self._graph, stream=side):
                call()

    def replay(self, times: int = 1) -> None:
        """Launch it on the current stream of its device."""
        with torch.cuda.device(self.device):
            for _ in range(times):
                self._graph.replay()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A graph that is destroyed while another is recorded spoils the recording (pytorch/pytorch#161037)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
