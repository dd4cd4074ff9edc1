"""A decode step over entries of which one leaves: attention, the scores that it gives, the choice, and closing up."""
