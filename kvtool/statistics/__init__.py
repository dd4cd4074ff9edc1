"""Statistics that `profile` streams past a model: one file each, every one a monoid (see `_base.py`)."""
