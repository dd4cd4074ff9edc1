"""What order costs: recall when the question comes after the context, before it, or after the context twice.

    gap = the better of the recalls with the question first and the context twice − recall in the plain order

A gap that the full cache has is the model's own; what the plan's is larger by, compression opened.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtool.corpus.order import FORMS, order
from kvtool.options import at_least
from kvtool.replay.subject import SIDES, Progress, Result, Subject
from kvtool.replay.tasks import _recall
from kvtool.replay.tasks._recall import Ask

METRICS = (
    *(f"order_{form}{end}" for form in FORMS for end in ("", "_full")), "order_gap", "order_gap_full",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """lengths: lengths of the prompts in plain order, tokens. samples: prompts per length and order. places: whose keys
    are told, one of which is asked for. batch: prompts decoded together. ask: is the question that ends a prompt known
    when it is compressed, or asked after."""

    lengths: tuple[int, ...] = (1000, 2000)
    samples: int = 8
    places: int = 4
    batch: int = 4
    ask: Ask = "known"

    def __post_init__(self) -> None:
        at_least(1, self, "samples", "places", "batch")


def run(subject: Subject, options: Options, progress: Progress) -> Result:
    metrics: dict[str, float] = {}
    detail: dict[str, object] = {}
    for form in FORMS:
        corpus = order(
            subject.model, form=form, lengths=options.lengths, samples=options.samples, places=options.places,
            seed=subject.seed,
        )  # fmt: skip
        names = _recall.Names(f"order_{form}", f"order_{form}_full", depths=False)
        found = _recall.judged(subject, corpus, options, names, progress)
        metrics |= found.metrics
        detail[form] = found.detail
    for end in ("", "_full"):
        others = max(metrics[f"order_{form}{end}"] for form in FORMS[1:])
        metrics[f"order_gap{end}"] = others - metrics[f"order_plain{end}"]
    return Result(metrics, detail)


def units(options: Options) -> int:
    """How many times `progress` is called."""
    return len(FORMS) * len(options.lengths) * options.samples


def show(result: Result):
    """Recall by order and prompt length: (columns, rows) for the terminal."""
    lengths = [point["length"] for point in result.detail[FORMS[0]]["grid"]]
    rows = [
        (f"{side}, {form}", *(f"{point[side]:.2f}" for point in result.detail[form]["grid"]))
        for form in FORMS
        for side in SIDES
    ]
    return ("order", *(f"{length} tokens" for length in lengths)), rows
