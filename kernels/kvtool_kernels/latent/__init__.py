"""Attention over keys that are held as latents and rebuilt, rotated, a tile at a time."""
