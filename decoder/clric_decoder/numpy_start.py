"""Imports numpy with one thread for its BLAS. With this module first, a command starts 10 ms sooner (busy CPUs: 40).

OpenBLAS starts a thread for each CPU when it is loaded, and the products of the synthesis are too small to use them.
The environment is as before afterwards: torch, which may have an OpenBLAS of its own, does not notice, nor do children.
"""

import os

_unset = "OPENBLAS_NUM_THREADS" not in os.environ
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy  # noqa: E402, F401

if _unset:
    del os.environ["OPENBLAS_NUM_THREADS"]
