"""Entries to codes with a scale per group of entries or channels, and back."""
