"""Known answers of APE, card C17; the formula, positions and order are in tests/cache/share/test_documents.py."""

from __future__ import annotations

import pytest
import torch

from kvtool.calibrate import calibrate
from kvtool.corpus.shelves import shelves
from kvtool.errors import InputError
from kvtool.measuring.apart import Apart, divergence, planned
from kvtool.plan import Plan, compose
from kvtool.slots import Documents
from tests import models
from tests.laws.stores import stored
from tests.tolerance import close, same

BRIEF = dict(samples=1, documents=2, tokens=60, lowest=0.5, step=0.25)
MODEL = models.with_tokenizer(models.shared("llama"))


def made(**settings: object) -> Plan:
    return calibrate("ape", BRIEF | settings, model=MODEL)


def test_the_grid_is_the_evidence() -> None:
    """The plan holds the best of what was measured, which can be measured again."""
    plan = made(samples=2)
    assert plan.read is not None
    assert plan.read.documents is not None
    assert plan.evidence["grid"].tolist() == [1.0, 0.75, 0.5]
    row, column = divmod(int(plan.evidence["kl"].argmin()), 3)
    facts, grid = plan.provenance["facts"], plan.evidence["grid"]
    assert (facts["temperature"], facts["scale"]) == (grid[row], grid[column])
    close(plan.read.documents.temperature, grid[row].float().expand(MODEL.geometry.layers))
    close(plan.read.documents.scale, grid[column].float().expand(MODEL.geometry.layers))
    found = []
    for shelf in shelves(MODEL, samples=2, documents=2, tokens=60, haystack="calibration"):
        apart = Apart(MODEL, shelf)
        found.append(divergence(apart.sequential(), apart.together(plan.read.documents)))
    close(torch.tensor(found).mean(), plan.evidence["kl"].min(), torch.float32)


@pytest.mark.parametrize("objective", ["kl", "loss"])
def test_the_objective_decides(objective: str) -> None:
    plan = made(objective=objective)
    row, column = divmod(int(plan.evidence[objective].argmin()), 3)
    assert plan.provenance["facts"]["temperature"] == plan.evidence["grid"][row]
    assert plan.provenance["facts"]["scale"] == plan.evidence["grid"][column]


@pytest.mark.parametrize("position", ["shared", "contiguous"])
def test_one_document_needs_neither(position: str) -> None:
    """Planted: with one document T = S = 1 is sequential reading, and nothing comes nearer to it."""
    plan = made(documents=1, position=position)
    assert plan.provenance["facts"]["temperature"] == plan.provenance["facts"]["scale"] == 1.0
    close(plan.evidence["kl"][0, 0], torch.zeros(()), torch.float32)
    assert bool((plan.evidence["kl"].flatten()[1:] > 1e-4).all())
    assert plan.slots["read"] is (position == "contiguous")


def test_given_is_given() -> None:
    plan = made(mode="given")
    assert plan.read is not None
    assert plan.read.documents is not None
    assert not plan.evidence
    assert plan.read.documents.temperature.unique().tolist() == pytest.approx([0.9])
    assert plan.read.documents.scale.unique().tolist() == pytest.approx([0.9])


def test_it_composes_with_what_holds_and_what_reads() -> None:
    """The documents' part of the slot is nobody else's; two of them are refused."""
    plan, bits = made(mode="given"), stored(MODEL, "four-bits")
    quest = calibrate("quest", dict(budget=0.5, page=4), model=MODEL)
    for order in ((plan, bits, quest), (quest, plan, bits)):
        both = compose(*order)
        assert both.read is not None
        assert quest.read is not None
        assert both.read.documents == plan.read.documents
        same(both.read.budget, quest.read.budget)
        assert both.store == bits.store
    with pytest.raises(InputError, match="fill the slot 'read'"):
        compose(plan, made(mode="given", scale=0.5))


def test_layers_may_differ() -> None:
    """T and S of one layer change what that layer puts out, and nothing before it."""
    (shelf,) = shelves(MODEL, samples=1, documents=3, tokens=60)
    apart, ones = Apart(MODEL, shelf), torch.ones(MODEL.geometry.layers)
    plain = apart.together(Documents(ones, ones))
    for layer in range(MODEL.geometry.layers):
        one = ones.clone()
        one[layer] = 0.5
        assert divergence(plain, apart.together(Documents(one, ones))) > 1e-6
        assert divergence(plain, apart.together(Documents(ones, one))) > 1e-6


@pytest.mark.parametrize("settings", [dict(lowest=0), dict(step=1.5), dict(mode="given", temperature=0)])
def test_bad_options(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match="more than 0"):
        made(**settings)


def test_shelves() -> None:
    """Exact lengths; one document has the answer, and no other; each place in turn; seeds."""
    for kind in ("passkey", "needle"):
        found = shelves(MODEL, samples=4, documents=3, tokens=150, kind=kind)  # type: ignore[arg-type]
        for at, shelf in enumerate(found):
            texts = ["".join(map(chr, ids.tolist())) for ids in shelf.documents]
            answer = "".join(map(chr, shelf.answer.tolist()))
            told = "".join(map(chr, shelf.question.tolist())).split("? ")[1] + answer
            assert [len(text) for text in texts] == [150] * 3
            assert [told in text for text in texts] == [number == shelf.at for number in range(3)]
            assert shelf.at == at % 3
            assert len(shelf.asked) == len(shelf.question) + len(shelf.answer) - 1
    again = shelves(MODEL, samples=1, documents=3, tokens=150, seed=1)[0]
    assert any(not torch.equal(a, b) for a, b in zip(again.documents, found[0].documents, strict=True))
    with pytest.raises(InputError, match="too short"):
        shelves(MODEL, samples=1, documents=1, tokens=10)
    with pytest.raises(InputError, match="bad shelves"):
        shelves(MODEL, samples=1, documents=9, tokens=100, kind="needle")


def test_a_plan_that_only_says_how_documents_take_part() -> None:
    plan = planned(MODEL, Documents(torch.ones(2), torch.ones(2)))
    assert not any(plan.slots.values())
