"""What becomes of evicted entries: one file, one rule, named as a plan's `Select.merge` names it."""
