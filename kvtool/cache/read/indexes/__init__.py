"""Which units of the bulk a query looks at, where it does not look at all of them: one file, one index (see
`_base.py`)."""
