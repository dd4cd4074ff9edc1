"""Attention of queries over one segment of entries, with the log-sum-exp that makes segments mergeable."""
