"""How it is computed: the torch side. Workers are `python -m model.<stage>`."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
"""torch then asks for large tensors in pages of 2 MB, which it reads at its first tensor: a step of a
20M model got 99,000 new pages from the system before, in a fifth of its time."""
