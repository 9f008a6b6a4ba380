"""Lets `pytest` from anywhere find the modules at the repository's root; computes on one thread;
leaves out what can only run on the real TOFU and LUME where they are not. run.sh, where a test
calls it, finds the Python that runs the tests."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

import pipeline  # noqa: E402, F401  before torch: it silences a warning of torch's import
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
