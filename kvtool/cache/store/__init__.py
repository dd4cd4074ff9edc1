"""How entries are held that left the raw window, as the slot store of a plan says."""
