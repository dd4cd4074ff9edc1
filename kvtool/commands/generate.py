"""`kvtool generate`: text that goes on from one snapshot or several, the most likely token at each step.

Several prompts go on from the same documents, each by itself: what the documents hold is held once, where their plans
allow it, and every step is one pass of the network for all prompts that are not done (`cache/share/together.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, get_args

import torch

from kvtool import files, plan, snapshot
from kvtool.cache.segment_cache import SegmentCache
from kvtool.cache.share.documents import beside
from kvtool.cache.share.together import feed
from kvtool.commands._console import note, progress
from kvtool.commands._shelf import find
from kvtool.corpus import sources
from kvtool.errors import InputError
from kvtool.model import Model, load
from kvtool.plan import Plan
from kvtool.slots import Position
from kvtool.snapshot import Opened

FIELD = "prompt"  # of JSON lines


def run(
    name: str, words: Sequence[str], given: Sequence[str], listed: str | None, plan_path: str | None,
    position: str | None, tokens: int, device: str, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """Returns the record that `--json` prints; the `text` of its `answers` is what is printed otherwise. words:
    snapshots, and last the prompt, unless prompts are `given` or `listed` in a file."""
    if tokens < 1:
        raise InputError("bad --tokens", got=tokens, expected="1 or more")
    if position not in (None, *get_args(Position)):
        raise InputError("bad --position", got=position, expected=" or ".join(get_args(Position)))
    files.one_stdin(*words, listed, plan_path)
    paths, texts = _asked(words, given, listed)
    chosen = None if plan_path is None else plan.read(find(plan_path))
    model = load(name, dtype=dtype, device=device)
    prompts = [model.ids(text) for text in texts]
    if not all(len(prompt) for prompt in prompts):
        raise InputError("an empty prompt", expected="what follows the document")
    _ = model.fingerprint  # found out before the clock runs
    seconds, start = {}, time.perf_counter()
    caches, held = _caches(model, paths, chosen, position, [len(prompt) for prompt in prompts])
    seconds["load"] = time.perf_counter() - start
    made = _greedy(model, caches, prompts, tokens, seconds)
    told = paths[0] if len(paths) == 1 else f"{len(paths)} snapshots"
    first = "first token" if len(texts) == 1 else f"first tokens of {len(texts)} prompts"
    note(f"{told}: {held} tokens, loaded in {seconds['load']:.2f} s; {first} after {seconds['prompt']:.2f} s more")
    answers = [
        {"prompt": text, "text": model.tokenizer.decode(ids), "ids": ids} for text, ids in zip(texts, made, strict=True)
    ]
    return {"snapshots": paths, "held": held, "answers": answers, "seconds": seconds}


def _asked(words: Sequence[str], given: Sequence[str], listed: str | None) -> tuple[list[str], list[str]]:
    """Snapshots and prompts."""
    paths, texts = list(words), list(given)
    if listed is not None:
        texts += sources.lines(listed, field=FIELD)
    elif not given:
        if len(words) < 2:
            raise InputError(
                "no prompt", got=f"only {words[0]}", expected="a snapshot and the text that follows it",
                remedy="or pass --prompt TEXT or --prompts FILE",
            )  # fmt: skip
        prompt = paths.pop()
        texts = [sources.content("-") if prompt == "-" else prompt]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a byte of the command line that is not UTF-8
            raise InputError("the prompt is not text", got=ascii(text), expected="UTF-8") from error
    return paths, texts


def _caches(
    model: Model, paths: Sequence[str], chosen: Plan | None, position: str | None, lengths: Sequence[int]
) -> tuple[list[SegmentCache], int]:
    """A cache for each prompt, of so many tokens, that stands after all of these snapshots, and how many tokens of
    documents those hold."""
    if len(paths) > 1 or chosen is not None:
        return _together(model, paths, chosen, position, lengths)
    whole = snapshot.load(paths[0], model)
    held = whole.segments[0].columns
    if len(lengths) == 1:
        return [whole], held
    try:
        return [_branch(model, whole) for _ in lengths], held
    except InputError as error:  # what comes later changes what is held of the document: a copy for everybody
        if paths[0] == "-":
            raise InputError(
                "several prompts need a document of this plan several times", got="a snapshot on stdin",
                expected="a file", remedy=f"for {error}",
            ) from error  # fmt: skip
        return [whole, *(snapshot.load(paths[0], model) for _ in lengths[1:])], held


def _branch(model: Model, whole: SegmentCache) -> SegmentCache:
    return SegmentCache(
        model, whole.plan, protocol=whole.protocol, prompt_length=whole.prompt_length, prefix=whole
    )  # fmt: skip


def _together(
    model: Model, paths: Sequence[str], chosen: Plan | None, position: str | None, lengths: Sequence[int]
) -> tuple[list[SegmentCache], int]:
    """The same for documents that were read apart."""
    opened = [snapshot.opened(path, model) for path in paths]
    prefix, documents = _prefix(model, paths, opened)
    mode: Position | None = "contiguous" if position == "contiguous" else "shared" if position else None
    held = [document.cache for document in documents]
    caches = [
        beside(model, SegmentCache(model, chosen, prompt_length=length), prefix, held, position=mode)
        for length in lengths
    ]
    return caches, sum(len(document.tokens) for document in documents)


def _prefix(
    model: Model, paths: Sequence[str], opened: Sequence[Opened]
) -> tuple[SegmentCache | None, Sequence[Opened]]:
    """The shared prefix, from a file if one of them holds it, and the files that hold documents."""
    after = next((file.prefix for file in opened if len(file.prefix)), None)
    if after is None:
        return None, opened
    documents = [file for file in opened if not torch.equal(file.tokens, after) or len(file.prefix)]
    for path, file in zip(paths, opened, strict=True):
        if any(file is document for document in documents) and not torch.equal(file.prefix, after):
            raise InputError(
                "documents were read after different prefixes", got=f"{path}: {len(file.prefix)} tokens of another",
                expected=f"the {len(after)} tokens of the others", remedy="save all with the same --prefix",
            )  # fmt: skip
    whole = [file for file in opened if not any(file is document for document in documents)]
    return (whole[0].cache if whole else documents[0].made_prefix(model)), documents


def _greedy(
    model: Model,
    caches: Sequence[SegmentCache],
    prompts: Sequence[torch.Tensor],
    tokens: int,
    seconds: dict[str, float],
) -> list[list[int]]:
    """The next tokens after each prompt, at most so many, up to the end of the text; `seconds` gets those before the
    first ones."""
    made: list[list[int]] = [[] for _ in prompts]
    pieces, start = dict(enumerate(prompts)), time.perf_counter()
    with progress("generate", tokens) as advance, model.served(), torch.no_grad():
        while pieces:
            numbers, found = list(pieces), _next(model, [caches[number] for number in pieces], list(pieces.values()))
            seconds.setdefault("prompt", time.perf_counter() - start)
            pieces = {}
            for number, token in zip(numbers, found, strict=True):
                if token == model.tokenizer.eos_token_id:
                    continue
                made[number].append(token)
                if len(made[number]) < tokens:
                    pieces[number] = torch.tensor([token])
            advance("" if len(prompts) == 1 else f"{len(pieces)} of {len(prompts)} prompts")
    return made


def _next(model: Model, caches: Sequence[SegmentCache], pieces: Sequence[torch.Tensor]) -> list[int]:
    """Pieces int64 [T_i], each fed to its cache → the most likely next token of each."""
    if len(caches) > 1 and all(cache.onward is None for cache in caches):
        rows = feed(model, caches, [piece[None] for piece in pieces])
    else:  # tokens that leave the forward do so in a pass of their own
        rows = [_alone(model, cache, piece) for cache, piece in zip(caches, pieces, strict=True)]
    return [int(logits[0].argmax()) for logits in rows]


def _alone(model: Model, cache: SegmentCache, ids: torch.Tensor) -> torch.Tensor:
    """The logits [1,V] after ids int64 [T]. Positions go on from those that the documents had."""
    first = cache.segments[0].place
    positions = torch.arange(first, first + len(ids), device=model.device)
    return model.network(
        input_ids=ids[None].to(model.device), position_ids=positions[None], past_key_values=cache, logits_to_keep=1
    ).logits[:, -1]
