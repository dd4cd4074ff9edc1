"""How the earlier entries are ranked that a block of a prompt's queries may read; one file each."""
