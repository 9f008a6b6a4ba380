"""Around the method: run folders, downloads, plans, reports."""

import warnings
from importlib import import_module
from pathlib import Path

# torch says this, when imported, wherever NumPy is not installed; nothing here needs NumPy.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

# The rows that a fork adds to tables, in files of the folder `forks` beside this one; here, because
# every process of a run imports this.
for file in sorted((Path(__file__).resolve().parent.parent / "forks").glob("*.py")):
    import_module(f"forks.{file.stem}")
