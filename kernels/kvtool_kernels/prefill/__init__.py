"""Causal attention of a chunk over sinks and a sliding window."""
