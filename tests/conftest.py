"""Lets `pytest` from anywhere find the modules at the repository's root; computes on one thread."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline  # noqa: E402, F401  before torch: it silences a warning of torch's import
import torch  # noqa: E402

torch.set_num_threads(1)  # models this small only lose time to threads
