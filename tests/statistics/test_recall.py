"""What choices find, against weights that were written down, and keys of which the answer is known."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from kvtool.corpus.base import Sample, gather
from kvtool.model import Model
from kvtool.rotary import NONE
from kvtool.statistics._base import States
from kvtool.statistics._choices import CHOICES, GRAPH, PAGES, Choice, Ranking
from kvtool.statistics.recall import BUDGETS, RECENT, ROWS, SINK, Recall
from tests import models
from tests.models import random_ids
from tests.statistics.naive import Seen, written_down
from tests.statistics.observed import trace
from tests.tolerance import TOLERANCE, close, same

TOKENS = 182
FIRST, END = TOKENS - ROWS, SINK + 128  # two units of 64
NAMES = list(CHOICES)


@functools.cache
def seen(name: str) -> tuple[Recall, list[Seen]]:
    model, ids = models.shared(name), random_ids(1, TOKENS, seed=3)[0]
    made = trace(model, {"text": gather("text", [Sample(ids, "text")], seed=0, options={})}, ["recall"])
    return made["recall"], written_down(model, ids)  # type: ignore[return-value]


def count(budget: float, unit: int = 1) -> int:
    return max(1, round(budget * (END - SINK) / unit))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_against_weights_written_down(name: str) -> None:
    """All that is read, the newest entries, the best entries, and the best pages by their mean keys."""
    found, layers = seen(name)
    group = models.shared(name).geometry.group
    assert int(found["rows"]) == ROWS
    assert int(found["counted"]) == sum(layer.window is None for layer in layers)
    for index, layer in enumerate(layers):
        if layer.window is not None:
            assert not bool(found["mass"][index].any() | found["bulk"][index].any() | found["always"][index].any())
            continue
        rows = layer.weights.float()[:, FIRST:].unflatten(0, (-1, group)).mean(1)
        bulk = rows[..., SINK:END]
        close(found["bulk"][index], bulk.sum((1, 2)).double(), torch.float32)
        close(found["always"][index], (rows.sum(-1) - bulk.sum(-1)).sum(1).double(), torch.float32)
        means = layer.k[:, SINK:END].float().unflatten(1, (-1, 16)).mean(2)
        q = layer.q[:, FIRST:].float().unflatten(0, (-1, group))
        pages = (layer.scale * q @ means[:, None].mT).softmax(-1).mean(1)
        worth = bulk.unflatten(2, (-1, 16)).sum(-1)
        alone = layer.scale * q @ layer.k[:, None, SINK:END].float().mT
        best = alone.softmax(-1).mean(1)  # of the bulk alone: what the choice is made by
        for at, budget in enumerate(BUDGETS):
            mine = {
                "recent": bulk[..., bulk.shape[2] - round(budget * bulk.shape[2]) :],
                "token keys": bulk.gather(2, best.topk(count(budget)).indices),
                "page-16 mean": worth.gather(2, pages.topk(count(budget, 16)).indices),
            }
            for choice, values in mine.items():
                close(found["mass"][index, :, NAMES.index(choice), at], values.sum((1, 2)).double(), torch.float32)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_nothing_finds_more_than_there_is_and_more_finds_more(name: str) -> None:
    found, layers = seen(name)
    whole = [index for index, layer in enumerate(layers) if layer.window is None]
    mass, bulk = found["mass"][whole], found["bulk"][whole]
    slack = TOLERANCE[torch.float32][0]
    assert bool((mass <= bulk[..., None, None] + slack).all())
    assert bool((mass.diff(dim=-1) >= -slack).all())
    close(found["always"][whole] + bulk, torch.full_like(bulk, ROWS), torch.float32)


def planted(k: torch.Tensor, q: torch.Tensor) -> SimpleNamespace:
    """One layer's keys k [T,D], alike in all heads, and rows that all ask q [D] → share of the bulk that each finds."""
    geometry = models.shared("llama").geometry
    keys, queries = k.expand(geometry.kv_heads, -1, -1), q.expand(geometry.query_heads, len(k), -1)
    made = Recall(None, geometry)
    made.states(States(0, queries, keys, keys, 1.0, None, None, NONE, None, Sample(torch.arange(len(k)), "text")))
    shares = made["mass"][0] / made["bulk"][0][:, None, None]
    same(shares[0], shares[1])
    return SimpleNamespace(made=made, share={name: shares[0, number] for number, name in enumerate(NAMES)})


def test_one_entry_is_hidden_from_its_page_but_not_from_its_bound() -> None:
    """Its neighbours point the other way: the mean says nothing, the maximum finds it, as entries and clusters do."""
    k = 0.01 * torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(0))
    at = SINK + 5 * 16 + 3
    k[at - 3 : at + 13, 0] = -3.0
    k[at, 0] = 30.0
    share = planted(k, torch.eye(8)[0]).share
    for name in NAMES:
        if name.startswith("token") or name in ("page-16 minmax", "page-16 between", "page-16 between-pages"):
            assert bool((share[name] > 0.999).all()), name
    assert bool((share["page-16 mean"] < 0.001).all())
    assert float(share["cluster-16 mean"][-1]) > 0.999  # a budget that ends within the cluster may miss it
    assert bool((share["recent"] < 0.001).all())


def test_neighbours_that_are_alike_are_found_by_their_mean() -> None:
    k = 0.01 * torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(0))
    k[:, 0] -= 0.1  # the others point the other way, so that a run begins where these do
    k[SINK + 64 : SINK + 80, 0] = 20.0
    share = planted(k, torch.eye(8)[0]).share
    assert bool((share["page-16 mean"] > 0.999).all())
    assert float(share["run-16 mean"][-1]) > 0.999
    assert float(share["run-16 root-mean"][-1]) > 0.999
    assert float(share["page-64 mean"][-1]) > 0.999
    assert float(share["token keys"][0]) < 0.25  # 3 of 16 at a budget of 0.02
    assert float(share["token keys"][-1]) > 0.999


def test_keys_that_were_attended_stand_for_a_page_whose_mean_says_nothing() -> None:
    k = 0.01 * torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(0))
    at = SINK + 96
    k[at : at + 12, 0] = -8.0
    k[at + 12 : at + 16, 0] = 15.0
    share = planted(k, torch.eye(8)[0]).share
    assert bool((share["page-16 attended"] > 0.999).all())
    assert bool((share["page-16 mean"] < 0.001).all())


@pytest.mark.parametrize(
    ("choice", "same_as"),
    [
        (Choice("page", 1, "keys", index="cluster", search={"entries": 16, "scan": 1.0}), "token keys"),
        (Choice("page", 1, "keys", index="graph", search=GRAPH | {"ef": 128}), "token keys"),
        (Choice("page", 16, "between", index="pages", search=PAGES | {"share": 1.0}), "page-16 between"),
    ],
)
def test_an_index_that_looks_at_everything_finds_what_the_summary_finds(choice: Choice, same_as: str) -> None:
    g = torch.Generator().manual_seed(1)
    geometry = models.shared("llama").geometry
    q, k = (torch.randn(heads, TOKENS, 8, generator=g) for heads in (geometry.query_heads, geometry.kv_heads))
    view = States(0, q, k, k, 0.5, None, None, NONE, None, Sample(torch.arange(TOKENS), "text"))
    known = CHOICES[same_as]
    assert known is not None
    made, expected = (Ranking(view, each, FIRST, SINK, END) for each in (choice, known))
    for count in (1, 3, 8):
        same(made.best(count)[0], expected.best(count)[0])


def test_what_is_looked_at(llama: Model) -> None:
    """Shares of keys and values: 8 channels, of which narrow summaries look at one, 3 query heads to a KV head."""
    found, _ = seen("llama")
    shares = found["looked"] / found["counted"]
    looked = dict(zip(NAMES, shares[:, 0].tolist(), strict=True))
    for number, name in enumerate(NAMES):  # only a search for entries looks at more if it must find more
        assert name in ("token clusters", "token graph") or bool((shares[number] == looked[name]).all())
    group = llama.geometry.group
    assert looked["recent"] == 0
    assert looked["token keys"] == 1 / 2
    assert looked["token own-channels"] == group / 8 / 2
    assert looked["token channels"] == looked["token low-rank"] == 1 / 8 / 2
    assert looked["page-16 minmax"] == 2 / 16 / 2
    assert looked["page-16 between"] == looked["page-16 mean"] == looked["page-16 attended"] == 1 / 16 / 2
    assert looked["page-16 between-pages"] == (1 / 32 + 1 / 2 / 16) / 2
    assert looked["page-64 mean"] == 1 / 64 / 2
    assert looked["run-16 mean"] == 1 / 16 / 2
    assert looked["cluster-16 mean"] == 1 / 16 / 2


def test_a_text_that_is_too_short_says_nothing() -> None:
    geometry = models.shared("llama").geometry
    made = Recall(None, geometry)
    tokens = SINK + RECENT + 63 + ROWS
    q, k = torch.zeros(geometry.query_heads, tokens, 8), torch.zeros(geometry.kv_heads, tokens, 8)
    made.states(States(0, q, k, k, 1.0, None, None, NONE, None, Sample(torch.arange(tokens), "text")))
    assert not any(bool(array.any()) for array in made.state.values())
