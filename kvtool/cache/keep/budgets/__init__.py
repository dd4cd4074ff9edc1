"""Rules that deal out budgets by score: one file, one rule, named as a plan's `Select.spread` names it."""
