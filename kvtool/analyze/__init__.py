"""What a trace says about its model: one file per finding (see `_base.py`)."""
