"""Passkey recall of SmolLM2 by which heads keep everything: the shipped duo plans, random heads, induction heads, none.

python benchmarks/recall.py [--keys 4] [--lengths 1000,2000]
"""

from __future__ import annotations

import argparse
import sys

import torch
from _harness import table

from kvtool import plan
from kvtool.cache.segment_cache import SegmentCache
from kvtool.commands._shelf import find
from kvtool.corpus.passkey import passkey as grid
from kvtool.methods._base import best, full_attention
from kvtool.model import Model, load
from kvtool.plan import Plan
from kvtool.replay.subject import Subject
from kvtool.replay.tasks import passkey
from kvtool.slots import Keep

SINK, RECENT, HELD_AT = 16, 64, 4096
FULL = "full cache"


def contenders(model: Model) -> list[tuple[str, Plan, str]]:
    """(what, plan, protocol)."""
    duo = {share: plan.read(find(f"smollm2.duo-{share}")) for share in (50, 20)}
    eligible = full_attention(model.geometry)

    def random_heads(share: float) -> Plan:
        noise = torch.rand(eligible.shape, generator=torch.Generator().manual_seed(1))
        full = best(noise, round(share * int(eligible.sum())), eligible)
        return Plan("random", model.fingerprint, keep=Keep.heads(full, sink=SINK, recent=RECENT))

    return [
        (FULL, random_heads(1.0), "official"),
        ("duo, 50 % of KV heads full", duo[50], "strict"),
        ("duo, 20 % of KV heads full", duo[20], "strict"),
        ("duo, 20 % of KV heads full", duo[20], "official"),
        ("random 50 %", random_heads(0.5), "official"),
        ("random 20 %", random_heads(0.2), "official"),
        ("no head full (streaming)", random_heads(0.0), "official"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=4)
    parser.add_argument("--lengths", default="1000,2000")
    chosen = parser.parse_args()
    options = passkey.Options(lengths=tuple(map(int, chosen.lengths.split(","))), keys=chosen.keys)
    model, rows = load("smollm2"), []
    corpus = grid(model, lengths=options.lengths, depths=options.depths, keys=options.keys, seed=1)
    contestants = contenders(model)
    found: dict[str, list[bool]] = {}
    with model.served():
        for group in passkey.grouped(corpus.samples, options):
            tokens = passkey.prompts(group)
            dense = Subject(model, contestants[0][1]).cache("plan", tokens.shape[1])
            Subject(model, contestants[0][1]).prefill(dense, tokens[:, :-1])
            for what, candidate, protocol in contestants:
                subject = Subject(model, candidate, protocol)
                cache = subject.cache("plan", tokens.shape[1])
                if protocol == "official":  # the prefill is dense: every such plan starts from the same one
                    cache.adopt(dense)
                else:
                    subject.prefill(cache, tokens[:, :-1])
                found.setdefault(f"{what}, {protocol}", []).extend(passkey.recalled(subject, cache, group))
            print({name: sum(hits) for name, hits in found.items()}, file=sys.stderr, flush=True)
        long = torch.randint(100, 40000, (1, HELD_AT), generator=torch.Generator().manual_seed(0))
        Subject(model, contestants[0][1]).prefill(dense := SegmentCache(model), long)
        for what, candidate, protocol in contestants:
            cache = SegmentCache(model, candidate)
            cache.adopt(dense)
            hits = found[f"{what}, {protocol}"]
            share = cache.nbytes / dense.nbytes
            rows.append((what, protocol, f"{sum(hits)} of {len(hits)}", f"{sum(hits) / len(hits):.3f}", f"{share:.3f}"))
    columns = ("heads", "prefill", "found", "recall", f"bytes held at {HELD_AT} ÷ full")
    points = len(corpus.samples)
    table(f"Passkey recall at {chosen.lengths} tokens, {points} prompts, sink {SINK}, recent {RECENT}", columns, rows)


if __name__ == "__main__":
    main()
