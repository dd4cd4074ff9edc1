"""Generate with the full cache and with a plan on the same inputs, and say what it cost: quality, bytes, speed."""
