"""Lets `pytest` from anywhere find the modules at the repository's root; computes on one thread;
leaves out what can only run on the real TOFU and LUME where they are not. run.sh, where a test
calls it, finds the Python that runs the tests.

SIMU_TEST_LAYOUT=cuda: attention answers as CUDA's fused kernels lay it out in memory, [B, T, H, hd]
seen as [B, H, T, hd], so that the whole suite shows on a CPU what would only fail on a card."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ["TQDM_DISABLE"] = "1"  # as all.py
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

import pipeline  # noqa: E402, F401  before torch: it silences a warning of torch's import
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # models this small only lose time to threads


def pytest_configure(config):
    config.addinivalue_line("markers", "real_files(*paths): runs on these of SIMU_DATA")


def pytest_collection_modifyitems(config, items):
    """all.py counts what is left out here, apart from what is skipped."""
    folder = os.environ.get("SIMU_DATA")

    def absent(item):
        mark = item.get_closest_marker("real_files")
        return mark and not (folder and all(Path(folder, path).exists() for path in mark.args))

    left_out = [item for item in items if absent(item)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


plain_attention = torch.nn.functional.scaled_dot_product_attention


def attention_in_cuda_layout(*args, **options):
    y = plain_attention(*args, **options)  # [B, H, T, hd]
    if y.is_cuda:  # a fake one's: a machine without a card cannot move it
        return y
    return y.transpose(1, 2).contiguous().transpose(1, 2)


if os.environ.get("SIMU_TEST_LAYOUT") == "cuda":
    torch.nn.functional.scaled_dot_product_attention = attention_in_cuda_layout


@pytest.fixture
def cuda_layout(monkeypatch):
    """The same for one test, whatever the environment says."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        attention_in_cuda_layout)
