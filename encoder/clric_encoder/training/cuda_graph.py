"""Iterations of training as CUDA graphs: hundreds of small kernels that are launched together.

An iteration on a function of 30,000 values is hundreds of kernels that each take less time than their launch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

# Calls before the capture: libraries allocate memory and load kernels on first use, which a capture does not allow.
EAGER_CALLS = 3

# torch captures one graph at a time in a process.
_capturing = threading.Lock()


class CudaGraph:
    """A function whose work on the device is captured once and replayed on each call.

    Each call copies the arguments to tensors that stay where they are, and gives the tensors that the capture gave,
    with new values. All else that the function does must be the same each time, on the same memory.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        self._function, self._calls = function, 0

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self._calls:
            self._arguments = [argument.clone() for argument in arguments]
        self._calls += 1
        for own, argument in zip(self._arguments, arguments, strict=True):
            own.copy_(argument)
        if self._calls <= EAGER_CALLS:
            return self._function(*self._arguments)
        if self._calls == EAGER_CALLS + 1:
            self._capture()
        self._graph.replay()
        return self._results

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile
        with _capturing, torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = self._function(*self._arguments)
