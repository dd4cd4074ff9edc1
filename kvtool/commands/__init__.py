"""What each subcommand does between parsing and printing: one file per command, each with `run`."""
