"""Speculation: whatever drafts, the tokens are the full cache's, or of its law."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from kvtool import speculate as speculation
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.trial import Trial
from kvtool.errors import InputError
from kvtool.model import Model
from kvtool.plan import Plan
from kvtool.slots import Draft, Keep, Read, Select
from kvtool.speculate import Outcome, Rule, speculate
from tests import models
from tests.laws import readings
from tests.laws import test_compositions as compositions
from tests.laws.methods import ragged
from tests.laws.stores import NAMES, stored
from tests.models import random_ids
from tests.running import feed, own
from tests.tolerance import close, same

DRAFTS = ("none", "streaming", "ragged", "two-bits", "reading", "evicting")


def windowed(model: Model, *, sink: int = 2, recent: int = 12, **options: object) -> Plan:
    nothing = torch.zeros(model.geometry.layers, model.geometry.kv_heads, dtype=torch.bool)
    return Plan("window", model.fingerprint, keep=Keep.heads(nothing, sink=sink, recent=recent, **options))


def evicting(model: Model) -> Plan:
    """A cache of 12 entries from which every step evicts one by score."""
    shape = (model.geometry.layers, model.geometry.kv_heads)
    select = Select(torch.full(shape, 12.0), observe="all", sink=1, recent=4, when="step")
    return Plan("evicting", model.fingerprint, keep=Keep.heads(torch.ones(shape), sink=0, recent=1, select=select))


def plan(name: str, model: Model) -> Plan | None:
    if name == "none":
        return None
    if name == "streaming":
        return windowed(model, position="reindex")
    if name == "ragged":
        return ragged(model)
    if name == "evicting":
        return evicting(model)
    if name == "reading":
        budget = torch.full((model.geometry.layers,), 0.5)
        return Plan("reading", model.fingerprint, read=Read(budget, unit=4, recent=3))
    return stored(model, name)


def filled(model: Model, made: Plan | None, ids: torch.Tensor) -> SegmentCache:
    """A cache that holds all but the last of ids [1,T]."""
    cache = SegmentCache(model, made)
    feed(model, cache, ids[:, :-1], [ids.shape[1] - 1])
    cache.finish()
    return cache


@functools.cache
def greedy(name: str, tokens: int, *, fp32: bool = False) -> list[int]:
    """What the full cache writes after a fixed prompt of 24 tokens, one decode step at a time."""
    model = models.shared(name) if fp32 else models.double(name)
    token = random_ids(1, 24)
    cache, written = filled(model, None, token), []
    with model.served(), torch.no_grad():
        for _ in range(tokens):
            logits = model.network(input_ids=token[:, -1:], past_key_values=cache).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            written.append(int(token))
    return written


def drafted(model: Model, name: str, steps: int, tokens: int) -> Outcome:
    ids = random_ids(1, 24)
    full, draft = filled(model, None, ids), filled(model, plan(name, model), ids)
    outcome = speculate(model, full, draft, ids[:, -1:], steps, Draft(tokens))
    assert full.get_seq_length() == draft.get_seq_length() == 23 + steps
    return outcome


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral-window"])
def test_greedy_tokens_are_the_full_caches(architecture: str, name: str) -> None:
    outcome = drafted(models.double(architecture), name, 72, 3)
    assert outcome.tokens[0].tolist() == greedy(architecture, 72)
    assert outcome.passes == 72 - outcome.accepted  # each pass writes what was accepted and one more
    if name == "none":
        assert outcome.acceptance == 1.0
        assert outcome.tokens_per_pass == 4.0


@pytest.mark.parametrize("name", [*readings.CASES, "across-layers", "selection"])
def test_any_plan_drafts(name: str) -> None:
    """Whatever a layer remembers of the drafted tokens, or leaves to another layer, is no longer there afterwards."""
    model = models.double("llama")
    others = {"across-layers": compositions.across_layers, "selection": compositions.selection}
    made = others[name](model) if name in others else readings.reading(model, name)
    ids = random_ids(1, 24)
    full, draft = filled(model, None, ids), filled(model, made, ids)
    outcome = speculate(model, full, draft, ids[:, -1:], 40)
    assert outcome.tokens[0].tolist() == greedy("llama", 72)[:40]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_greedy_tokens_in_single_precision(architecture: str) -> None:
    """A near tie may part the two, and is reported where they part; nothing else may."""
    outcome = drafted(models.shared(architecture), "streaming", 180, 5)
    written, expected = outcome.tokens[0].tolist(), greedy(architecture, 180, fp32=True)
    parted = next((at for at in range(180) if written[at] != expected[at]), None)
    assert parted is None or parted in outcome.near_ties
    assert 0 < outcome.acceptance < 1


def test_near_ties_are_reported() -> None:
    model = models.build("llama")
    twin = model.network.lm_head.weight  # tokens 2i and 2i + 1 are always equally likely
    twin[1::2] = twin[::2]
    assert drafted(model, "none", 9, 2).near_ties == tuple(range(9))
    assert drafted(models.double("gemma3"), "none", 9, 2).near_ties == ()


@pytest.mark.parametrize("name", ["none", "streaming", "ragged"])
@pytest.mark.parametrize("prompt", [2, 6, 30])
def test_tokens_on_trial_see_what_decoding_sees(prompt: int, name: str, any_model: Model) -> None:
    """Also before the sinks or the window are full, and when the tokens on trial alone overfill them."""
    held = windowed(any_model, recent=5, position="reindex") if name == "streaming" else plan(name, any_model)
    ids = random_ids(1, prompt + 9, seed=prompt)
    expected = feed(any_model, SegmentCache(any_model, held), ids, [prompt, *[1] * 9])[:, prompt:]
    cache = SegmentCache(any_model, held)
    feed(any_model, cache, ids[:, :prompt], [prompt])
    trial = Trial(cache)
    before = cache.nbytes
    for chunks in ([9], [1] * 9, [4, 1, 4]):
        close(_fed(any_model, trial, ids[:, prompt:], chunks), expected)
        trial.drop()
    _fed(any_model, trial, ids[:, prompt:], [9])
    assert cache.nbytes == before
    trial.keep(4, cache)
    rest = _fed(any_model, cache, ids[:, prompt + 4 :], [1] * 5)
    close(rest, expected[:, 4:])


def _fed(model: Model, cache: object, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    with model.served(), torch.no_grad():
        return torch.cat(
            [model.network(input_ids=x, past_key_values=cache).logits for x in ids.split(chunks, 1)], dim=1
        )


@pytest.mark.parametrize("name", [*DRAFTS[1:], *NAMES[2:]])
def test_kept_tokens_are_held_as_decoded_ones(name: str) -> None:
    """In a first layer keys and values depend on the tokens alone."""
    model = models.shallow("llama")
    model.network.to(torch.float64)
    made, ids = plan(name, model), random_ids(1, 50, seed=3)
    decoded, kept, full = (filled(model, p, ids[:, :21]) for p in (made, made, None))
    _fed(model, decoded, ids[:, 20:], [1] * 30)
    trial = Trial(full)
    for count in (1, 5, 0, 13, 11):
        at = kept.get_seq_length()
        _fed(model, trial, ids[:, at : at + 15], [min(15, 50 - at)])
        trial.keep(count, full, kept)
    assert kept.get_seq_length() == decoded.get_seq_length() == 50
    assert kept.entries().tolist() == decoded.entries().tolist()
    for mine, theirs in zip(kept.segments[0].lanes(), decoded.segments[0].lanes(), strict=True):
        for x, y in zip(mine.recall()[:2], theirs.recall()[:2], strict=True):
            close(x, y)


VOCABULARY, SHORT, RUNS = 6, 3, 900


@functools.cache
def few() -> Model:
    """One layer, six tokens."""
    torch.manual_seed(5)
    network = LlamaForCausalLM(LlamaConfig(**models.SIZES | dict(vocab_size=VOCABULARY, num_hidden_layers=1)))
    return Model(network.eval().requires_grad_(False), None, "few")


@functools.cache
def exact(temperature: float) -> dict[tuple[int, ...], float]:
    """Every continuation of `SHORT` tokens → its probability under the full cache."""
    found = {}
    rows = list(itertools.product(range(VOCABULARY), repeat=SHORT))
    ids = torch.cat([torch.tensor([[1, 4, 2, 0]]).expand(len(rows), -1), torch.tensor(rows)], dim=1)
    logs = (own(few(), ids).double()[:, 3:-1] / temperature).log_softmax(-1)
    for row, log in zip(rows, logs.gather(2, ids[:, 4:, None]).sum((1, 2)).tolist(), strict=True):
        found[row] = math.exp(log)
    return found


def p_value(temperature: float, tokens: int) -> float:
    """Of χ² between the continuations of many seeds and their law; rare ones are counted together."""
    model, ids, seen = few(), torch.tensor([[1, 4, 2, 0]]), Counter()
    made = windowed(model, sink=0, recent=1)
    full, draft = filled(model, None, ids), filled(model, made, ids)
    generator, accepted = torch.Generator().manual_seed(1), []
    for _ in range(RUNS):  # a branch starts over from the prompt
        sides = SegmentCache(model, prefix=full), SegmentCache(model, made, prefix=draft)
        outcome = speculate(
            model, *sides, ids[:, -1:], SHORT, Draft(tokens), temperature=temperature, generator=generator
        )
        seen[tuple(outcome.tokens[0].tolist())] += 1
        accepted.append(outcome.acceptance)
    assert 0.2 < sum(accepted) / RUNS < 0.9  # both ends of a round are tried
    law = exact(temperature)
    often = [row for row, p in law.items() if p * RUNS >= 5]
    counts, expected = [seen[row] for row in often], [law[row] * RUNS for row in often]
    return float(chisquare([*counts, RUNS - sum(counts)], [*expected, RUNS - sum(expected)]).pvalue)


@pytest.mark.parametrize(("temperature", "tokens"), [(1.0, 2), (0.5, 1)])
def test_sampled_tokens_have_the_full_caches_law(temperature: float, tokens: int) -> None:
    assert p_value(temperature, tokens) > 1e-3


def test_another_residual_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law after a rejection is p − q, not p: the test above can tell."""
    right = speculation.verify

    def wrong(logits, drafted, laws, rule):
        out = right(logits, drafted, laws, rule)
        at = len(out) - 1
        if at < len(drafted):
            out[at] = speculation.draw(rule.law(logits[at]), rule.generator)
        return out

    monkeypatch.setattr(speculation, "verify", wrong)
    assert p_value(0.5, 2) < 1e-6


def test_two_symbols() -> None:
    """TriForce's inner laws: a draft (.6, .4) against (.3, .7) accepts 0.7 and leaves exactly (.3, .7)."""
    q, p = torch.tensor([0.6, 0.4], dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)
    generator, runs = torch.Generator().manual_seed(0), 4000
    logits, first, accepted = torch.stack([p.log(), p.log()]), 0, 0
    for _ in range(runs):
        token = speculation.draw(q, generator)
        new = speculation.verify(logits, [token], [q], Rule(1.0, generator))
        first += new[0] == 0
        accepted += len(new) == 2
    assert chisquare([first, runs - first], [0.3 * runs, 0.7 * runs]).pvalue > 1e-3
    assert chisquare([accepted, runs - accepted], [0.7 * runs, 0.3 * runs]).pvalue > 1e-3


def test_a_seed_repeats(llama: Model) -> None:
    ids, outs = random_ids(1, 24), []
    for seed in (3, 3, 4):
        full, draft = filled(llama, None, ids), filled(llama, ragged(llama), ids)
        generator = torch.Generator().manual_seed(seed)
        outs.append(speculate(llama, full, draft, ids[:, -1:], 20, temperature=1.0, generator=generator).tokens)
    same(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_refused(llama: Model) -> None:
    ids = random_ids(1, 8)
    full, draft, token = filled(llama, None, ids), filled(llama, ragged(llama), ids), ids[:, -1:]
    with pytest.raises(InputError, match="one sequence"):
        speculate(llama, full, draft, token.expand(2, 1), 4)
    with pytest.raises(InputError, match="bad draft"):
        Draft(tokens=0)
    with pytest.raises(InputError, match="bad speculation"):
        speculate(llama, full, draft, token, 4, temperature=math.nan)
    with pytest.raises(InputError, match="full cache verifies"):
        speculate(llama, draft, draft, token, 4)
    with pytest.raises(InputError, match="same tokens"):
        speculate(llama, full, filled(llama, None, ids[:, :5]), token, 4)
    with pytest.raises(InputError, match="one sequence"):
        speculate(llama, SegmentCache(llama), SegmentCache(llama), token, 4)
    both = SegmentCache(llama)
    feed(llama, both, random_ids(2, 7), [7])
    with pytest.raises(InputError, match="one sequence"):
        speculate(llama, full, both, token, 4)
