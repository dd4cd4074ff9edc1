"""What methods measure on a model, beyond what a trace holds, and what they make of it."""
