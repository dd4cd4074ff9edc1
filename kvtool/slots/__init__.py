"""The vocabulary of plans: what each slot can say. Data only; the cache executes it. It knows no method by name."""

from kvtool.slots.draft import Draft
from kvtool.slots.keep import EVERYTHING, Keep, Select
from kvtool.slots.read import Read
from kvtool.slots.store import RAW, Store

__all__ = ["EVERYTHING", "RAW", "Draft", "Keep", "Read", "Select", "Store"]
