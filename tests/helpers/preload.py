"""What the server process imports before it forks ranks."""

import os

import torch

# Two cores serve all ranks; more threads only get in each other's way.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from more_megatron.platform import initialize_platform  # noqa: E402

initialize_platform()

import tests.helpers.training  # noqa: E402, F401
