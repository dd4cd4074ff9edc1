"""Rules that choose a number of entries by score: one file, one rule, named as a plan's `Select.pick` names it."""
