"""Which entries a query touches, as the slot read of a plan says: at decode steps, and as a prompt is fed."""
