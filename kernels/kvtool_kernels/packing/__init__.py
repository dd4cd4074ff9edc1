"""Codes of 1 to 8 bits to bytes and back, in bit planes; five trits to a byte."""
