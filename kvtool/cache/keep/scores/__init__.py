"""Rules that score entries for eviction: one file, one rule, named as a plan's `Select.score` names it."""
