"""Which entries stay: scores, budgets, choices and merges, as the slot keep of a plan says."""
