"""Many methods on the same prompts: which cells there are, what each of them reached, and who is on the front."""
