"""The cache that executes a plan: ragged segments per KV head, really freed, attended to by merging."""
