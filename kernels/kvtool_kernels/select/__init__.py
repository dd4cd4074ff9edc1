"""Pages of entries: their bounds, their scores, and attention over the entries that were chosen."""
