"""InfiMed: train, evaluate and ship compact medical vision-language models."""

import os

__version__ = "0.1.0"

# Nothing here fetches, and nothing leaves the machine. Set before anything is imported: the hub's library reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
