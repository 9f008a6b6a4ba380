"""Lets `pytest` from anywhere find the modules at the repository's root; computes on one thread.

SIMU_TEST_LAYOUT=cuda: attention answers as CUDA's fused kernels lay it out in memory, [B, T, H, hd]
seen as [B, H, T, hd], so that the whole suite shows on a CPU what would only fail on a card."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pipeline  # noqa: E402, F401  before torch: it silences a warning of torch's import
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # models this small only lose time to threads
plain_attention = torch.nn.functional.scaled_dot_product_attention


def attention_in_cuda_layout(*args, **given):
    y = plain_attention(*args, **given)  # [B, H, T, hd]
    return y.transpose(1, 2).contiguous().transpose(1, 2)


if os.environ.get("SIMU_TEST_LAYOUT") == "cuda":
    torch.nn.functional.scaled_dot_product_attention = attention_in_cuda_layout


@pytest.fixture
def cuda_layout(monkeypatch):
    """The same for one test, whatever the environment says."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        attention_in_cuda_layout)
