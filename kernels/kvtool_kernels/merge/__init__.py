"""Exact merge of two partial attention results by their log-sum-exp."""
