"""Attention of queries over one coded segment, read without holding its decoded form."""
