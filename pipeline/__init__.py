"""Around the method: run folders, downloads, plans, reports."""

import warnings

# torch says this, when imported, wherever NumPy is not installed; nothing here needs NumPy.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
