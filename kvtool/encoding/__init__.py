"""How an entry is encoded: transforms, then a codec, then residuals. Data that a plan holds, and pure functions."""
