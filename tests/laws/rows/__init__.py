"""One row per method, by the slot it fills: small settings, lossless settings, and a ladder of growing budgets.

A new method gets a row in `keep.py`, `store.py` or `read.py` and is then held to every law;
`test_methods.py` fails while it has none.
"""

from tests.laws.rows import keep, read, store
from tests.laws.rows._base import Options, Row

__all__ = ["ROWS", "Options", "Row"]

ROWS = keep.ROWS | store.ROWS | read.ROWS
