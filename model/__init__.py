"""How it is computed: the torch side. Workers are `python -m model.<stage>`."""
