"""The commands, a file for each group: what can be typed, and what is printed. `kvtool/commands/` does the work."""
