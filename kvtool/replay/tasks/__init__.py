"""What a replay measures: one file per task, each with `Options`, `METRICS` (what it measures, by name),
`units(options)` and `run(subject, options, progress)`, and where a table helps `show(result)`. `DRAFTS = True` says
that it measures something under plans that draft too, `DRAFTED` which metrics only under these.

A task that many plans can be compared by has `compared(model, options, length, seed)`, its prompts of one length, each
with the answer that follows; `score(full, plan, answer)`, numbers of one prompt from both sides' logits along the
answer; `tally(scores)`, what these come to; `QUALITY`, the number of the tally, 0 to 1, that stands for it; `ASKED`, do
its prompts end with a question that can be asked after compression; and `SHORT`, options of which a comparison starts.
"""
