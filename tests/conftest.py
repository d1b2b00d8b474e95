"""For every test and every process it starts: one CPU thread. Models here are tiny, and threads that share cores stall each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes, and for threads, each of which counts for itself

import torch

torch.set_num_threads(1)
