"""kvtool: measure how a transformer uses its KV cache, calibrate a compression plan, prove it by generating."""

__version__ = "0.1.0"
