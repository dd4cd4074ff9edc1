"""Pages of entries: their scores, and attention over the entries that were chosen."""
