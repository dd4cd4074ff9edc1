"""What the slots of one plan may not say together: one rule, one function. It knows slots, not methods.

A rule returns what is wrong and what to do, or None. `check` raises InputError with the first that is broken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvtool.errors import InputError

if TYPE_CHECKING:
    from kvtool.plan import Plan

Conflict = tuple[str, str] | None


def check(plan: Plan) -> None:
    """Raise InputError when slots contradict one another, or an encoding does not fit the model's heads."""
    if plan.store is not None:
        plan.store.check(plan.model["kv_heads"], plan.model["head_dim"])
    if plan.read is not None:
        plan.read.check(plan.keep)
    rules = (
        counted, across_layers, across_layers_read, across_heads, followed, demoted, joined_by_age, step_by_step,
        while_the_prompt_comes, bounded, fed_again, in_one_latent, gone_on,
    )  # fmt: skip
    for rule in rules:
        conflict = rule(plan)
        if conflict is not None:
            raise InputError(conflict[0], remedy=conflict[1])


def counted(plan: Plan) -> Conflict:
    """Counts of merged entries are known to raw entries only."""
    select = None if plan.keep is None else plan.keep.select
    if select is None or not select.count or not (plan.slots["store"] or plan.slots["read"]):
        return None
    return (
        "entries stand for several, and say so in their logits, but what is encoded or chosen has no count",
        "compose with a plan that holds and reads entries as they are, or merge without count",
    )


def across_layers(plan: Plan) -> Conflict:
    """Layers that are written as one must hold the same entries."""
    if plan.store is None:
        return None
    joined = [layer for span in plan.store.spans for layer in span]
    whole = torch.tensor([window is None for window in plan.model["windows"]])
    if plan.keep is not None:
        whole &= plan.keep.full.all(1) & (plan.keep.select is None) & ~plan.keep.gone
    broken = [layer for layer in joined if not whole[layer]]
    if not broken:
        return None
    return (
        f"layers are written as one across heads, but layer {broken[0]} drops entries of its own",
        "compose with a plan that keeps every entry, or stores layers apart",
    )


def across_layers_read(plan: Plan) -> Conflict:
    """Layers that are written as one are read as one."""
    if plan.store is None or plan.read is None:
        return None
    if not any(plan.read.acts(layer) for span in plan.store.spans for layer in span):
        return None
    return (
        "layers that are written as one cannot each choose what they read",
        "compose with a plan that reads everything, or stores layers apart",
    )


def across_heads(plan: Plan) -> Conflict:
    """KV heads that a transform joins must hold the same entries."""
    if plan.store is None or plan.keep is None:
        return None
    for layer in range(len(plan.store.index)):
        joined = any(encoding.mixes for store in plan.store.chain for encoding in store.layer(layer))
        if joined and plan.keep.ragged(layer):
            return (
                f"layer {layer}: entries are stored across heads, but each head keeps entries of its own",
                "compose with a plan that keeps the same entries in every head, or stores heads apart",
            )
    return None


def followed(plan: Plan) -> Conflict:
    """A layer with a sliding window of its own chooses nothing that others could go by."""
    if plan.read is None:
        return None
    windows = plan.model.get("windows", [])
    bad = [layer for layer, window in enumerate(windows) if window is not None and plan.read.followers(layer)]
    if not bad:
        return None
    return (
        f"layers go by the choice of layer {bad[0]}, which has a sliding window and makes none",
        "make a layer with full attention the owner",
    )


def demoted(plan: Plan) -> Conflict:
    """What is held lower instead of dropped must be dropped whole."""
    select = None if plan.keep is None else plan.keep.select
    if plan.store is None or plan.store.rest is None or select is None or select.merge == "drop":
        return None
    return ("dropped entries are merged into others, and would be held once more", "select without merging")


def joined_by_age(plan: Plan) -> Conflict:
    """Tiers of age hold entries of one layer."""
    if plan.store is None or plan.store.older is None or not plan.store.spans:
        return None
    return ("layers are written as one, and their entries again with age", "compose with a plan that does one of these")


def step_by_step(plan: Plan) -> Conflict:
    """Blocks are never written again, so nothing can be taken out of them."""
    select = None if plan.keep is None else plan.keep.select
    if select is None or select.when != "step" or plan.store is None or not plan.store.used:
        return None
    return (
        "entries are evicted one by one at every step, but they are stored in blocks that are never written again",
        "compose with a plan that evicts once, after the prompt",
    )


def while_the_prompt_comes(plan: Plan) -> Conflict:
    """A prompt's queries choose among all that came before them."""
    select = None if plan.keep is None else plan.keep.select
    if plan.read is None or not plan.read.sparse or select is None or select.when != "chunk":
        return None
    return (
        "a prompt's queries choose what they read of it, but entries are evicted after every chunk",
        "compose with a plan that evicts once, after the prompt",
    )


def bounded(plan: Plan) -> Conflict:
    """Boundaries come from a layer whose heads all hold the whole prompt."""
    spec = None if plan.read is None else plan.read.prefill
    if spec is None or spec.cut is None or spec.lossless:
        return None
    keep, layer = plan.keep, spec.leader
    held = keep is None or (bool(keep.full[layer].all()) and not bool(keep.gone[layer]))
    if held and plan.model.get("windows", [None] * (layer + 1))[layer] is None:
        return None
    return (
        f"layer {layer} makes the boundaries that a prompt is read by, but heads of it have a window",
        "compose with a plan that keeps all of that layer, or calibrate with another layer",
    )


def fed_again(plan: Plan) -> Conflict:
    """What is fed again takes the place of entries that are held as they came, all of them, and by all who look."""
    if plan.keep is None or plan.keep.position != "reencode":
        return None
    windows = plan.model.get("windows", [])
    own = torch.tensor([window is not None for window in windows], dtype=torch.bool)
    if bool((own & ~plan.keep.gone[: len(own)]).any()) or not bool(plan.keep.full.all()):
        return (
            "tokens behind a dropped one are fed again, but a window has let some of them go",
            "use position=reindex",
        )
    if plan.store is not None or plan.slots["read"]:
        return (
            "tokens behind a dropped one are fed again, but their entries were encoded, or indexed to choose from",
            "compose with a plan that holds and reads entries as they are",
        )
    return None


def in_one_latent(plan: Plan) -> Conflict:
    """Entries whose keys and values are written as one have keys only for queries that say where they stand."""
    if plan.store is None or not plan.store.joint:
        return None
    if plan.slots["read"]:
        return (
            "keys are written together with values, in part without RoPE: nothing can be chosen by them",
            "compose with a plan that reads everything, or stores keys and values apart",
        )
    if len(plan.store.chain) > 1 or plan.store.spans:
        return (
            "keys are written together with values, but entries also with age, as dropped ones or across layers",
            "compose with a plan that does one of these",
        )
    return None


def gone_on(plan: Plan) -> Conflict:
    """Layers that not all of a prompt reaches hold entries that stand apart, and no two layers the same."""
    keep = plan.keep
    if keep is None or keep.onward is None or not keep.leaving:
        return None
    reached = (keep.onward.budget[:, 0] == 1).cumprod(0).bool()
    windows = torch.tensor([window is not None for window in plan.model.get("windows", [])], dtype=torch.bool)
    if not bool((keep.full.all(1) | reached).all()) or bool((windows & ~reached[: len(windows)]).any()):
        return (
            "tokens leave the forward, but layers behind have windows, which count neighbours",
            "compose with a plan that keeps no window there; models whose layers have windows cannot be served so",
        )
    if keep.position != "original" or (keep.select is not None and keep.select.on_trial):
        return (
            "tokens leave the forward, but positions are counted inside the cache, or the prompt is scored on trial",
            "compose with a plan of position=original whose own queries score",
        )
    if plan.slots["read"] or (plan.store is not None and plan.store.spans):
        return (
            "tokens leave the forward, but layers are written as one, or queries choose among entries",
            "compose with a plan that reads everything and stores layers apart",
        )
    return None
