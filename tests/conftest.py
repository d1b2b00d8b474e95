"""For every test and every process it starts: one CPU thread. Models here are tiny, and threads that share cores stall each other.

And for every test the same random numbers: a test that fails once in hundreds of runs tells nobody anything.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes, and for threads, each of which counts for itself

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """The seed of torch's own generator."""
    torch.manual_seed(2026)
