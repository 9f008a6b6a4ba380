"""Around the method: run folders, downloads, plans, reports."""

import ctypes
import sys
import warnings

# torch says this, when imported, wherever NumPy is not installed; nothing here needs NumPy.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

if sys.platform == "linux":
    # glibc keeps what is freed below a size that grows to 32 MB, and blocks of many sizes fragment:
    # attribution of OLMo-1B took 20% more than was ever alive. Blocks of 4 MB now go back at once.
    M_MMAP_THRESHOLD = -3
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(M_MMAP_THRESHOLD, 4 << 20)
