"""For every test: one CPU thread. Models here are tiny, and on a busy machine threads that wait for each other cost more."""

import torch

torch.set_num_threads(1)
