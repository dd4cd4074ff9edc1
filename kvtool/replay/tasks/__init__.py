"""What a replay measures: one file per task, each with `Options`, `METRICS` (what it measures, by name),
`units(options)` and `run(subject, options, progress)`, and where a table helps `show(result)`. `DRAFTS = True` says
that it measures something under plans that draft too, `DRAFTED` which metrics only under these."""
