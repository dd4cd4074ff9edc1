"""What stands for a unit of entries when a query chooses what to read: one file, one summary (see `_base.py`)."""
