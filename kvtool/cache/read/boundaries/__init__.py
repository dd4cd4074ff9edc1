"""How much of a boundary between chunks of a prompt a place is; one file each."""
