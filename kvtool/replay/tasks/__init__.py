"""What a replay measures: one file per task, each with `Options`, `run(subject, options, progress)` and `show(result)`."""
