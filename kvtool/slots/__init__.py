"""The vocabulary of plans: what each slot can say. Data only; the cache executes it. It knows no method by name."""

from kvtool.slots.draft import Draft, Excerpt
from kvtool.slots.keep import EVERYTHING, Keep, Select
from kvtool.slots.prefill import Prefill
from kvtool.slots.read import Documents, Position, Read
from kvtool.slots.store import RAW, Store

__all__ = ["EVERYTHING", "RAW", "Documents", "Draft", "Excerpt", "Keep", "Position", "Prefill", "Read", "Select",
           "Store"]  # fmt: skip
