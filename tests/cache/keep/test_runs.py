"""Units of unequal length: where they begin, which of them are read, when a choice is made anew, and bytes read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvtool.cache.lane import Step
from kvtool.cache.read.board import Board, Place
from kvtool.cache.read.reader import Reader
from kvtool.cache.segments import Dense
from kvtool.errors import InputError
from kvtool.slots import Read
from tests.cache.read.test_reader import ENTRY, D, G, K, draw
from tests.tolerance import close, same

END = 9
PROMPT = torch.tensor([[1, 2, END, 3, END, END, 4, 5, 6, END, 7, 8]])
RUNS = [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4]
S = len(RUNS)


def spec(**changes: Any) -> Read:
    options: dict[str, Any] = dict(
        budget=torch.tensor([3.0]), unit=1, form="run", summary="mean", cut="tokens", ends=torch.tensor([END]).int()
    )
    return Read(**options | changes)


def step(tokens: torch.Tensor, start: int = S) -> Step:
    return Step(start, D**-0.5, tokens=tokens)


def filled(read: Read, k: torch.Tensor, v: torch.Tensor) -> tuple[Reader, Dense]:
    """A reader of one row's prompt, all of which has joined the bulk."""
    reader, bulk = Reader(read, Place(0, 0, tuple(range(K)), Board())), Dense()
    reader.receive(None, k, step(PROMPT, 0))
    reader.append(k, v)
    bulk.append(k, v)
    return reader, bulk


def one_hot() -> torch.Tensor:
    """Keys [1,K,S,D] that point along the channel of their run's number."""
    return 5 * torch.eye(D)[RUNS].expand(1, K, S, D).clone()


def ask(reader: Reader, bulk: Dense, channel: int, token: int = 1) -> torch.Tensor:
    """A decode step whose query points along a channel; what it puts out [G·K,D]."""
    q = 5 * torch.eye(D)[channel].expand(1, K * G, 1, D)
    now = step(torch.tensor([[token]]))
    reader.receive(q, draw(1, K, 1, D), now)
    return reader.attend(q, bulk, now)[0][0, :, 0]


@pytest.mark.parametrize("run", range(5))
def test_a_sentence_is_read_whole(run: int) -> None:
    """Runs are sentences with what ends them; a longer one is cut at the budget."""
    reader, bulk = filled(spec(budget=torch.tensor([4.0])), one_hot(), draw(1, K, S, D))
    ask(reader, bulk, run)
    assert reader.choice is not None
    assert reader.units.sizes is not None
    assert reader.units.sizes[0, 0].tolist() == [3, 2, 1, 4, 2]
    members = [at for at, number in enumerate(RUNS) if number == run]
    assert set(members) <= set(reader.choice[0, 0, 0].tolist())


def test_the_mean_query_of_the_sentence_chooses() -> None:
    """Two steps along run 3 and one along run 0: run 3 is still read, until the sentence ends."""
    reader, bulk = filled(spec(query="run", budget=torch.tensor([4.0])), one_hot(), draw(1, K, S, D))
    found = []
    for channel, token in ((3, 1), (3, 1), (0, END), (0, 1)):
        ask(reader, bulk, channel, token)
        assert reader.choice is not None
        found.append(6 in reader.choice[0, 0, 0].tolist())
    assert found == [True, True, True, False]


def test_the_first_steps_of_a_sentence_read_everything() -> None:
    v = draw(1, K, S, D)
    reader, bulk = filled(spec(whole=2), one_hot(), v)
    whole = []
    for token in (1, 1, 1, END, 1, 1, 1):
        ask(reader, bulk, 3, token)
        whole.append(reader.read_bytes(bulk) == K * S * ENTRY)
    assert whole == [True, True, False, False, True, True, False]


@pytest.mark.parametrize(("tokens", "looks"), [([1] * 6, 1), ([1, END, 1, 1, END, 1], 3), ([END] * 4, 4)])
def test_a_choice_is_made_anew_where_a_sentence_begins(tokens: list[int], looks: int) -> None:
    reader, bulk = filled(spec(period=0, renew=True), one_hot(), draw(1, K, S, D))
    for token in tokens:
        ask(reader, bulk, 1, token)
    assert reader.looks == looks * K
    assert reader.asks == len(tokens) * K
    share = D * 5 * 4 * K * looks // len(tokens)
    assert reader.read_bytes(bulk) == share + K * 3 * ENTRY


@pytest.mark.parametrize(("channels", "looks"), [([1, 1, 1, 1], 1), ([1, 2, 1, 2], 4), ([1, 1, 2, 2], 2)])
def test_a_choice_is_made_anew_where_the_query_jumps(channels: list[int], looks: int) -> None:
    read = spec(cut="queries", apart=torch.tensor([0.7]), period=0, renew=True)
    reader, bulk = filled(read, one_hot(), draw(1, K, S, D))
    for channel in channels:
        ask(reader, bulk, channel)
    assert reader.looks == looks * K


def test_keys_that_differ_begin_a_run() -> None:
    reader, bulk = filled(spec(cut="keys", apart=torch.tensor([0.5])), one_hot(), draw(1, K, S, D))
    ask(reader, bulk, 2)
    assert reader.units.labels is not None
    assert reader.units.labels[0, 1].tolist() == RUNS


def test_what_joins_later_joins_its_sentence() -> None:
    """The mean key of an open sentence is that of all its entries, whenever they came."""
    k, v = draw(1, K, S, D, seed=3), draw(1, K, S, D, seed=4)
    reader, bulk = Reader(spec(), Place(0, 0, tuple(range(K)), Board())), Dense()
    reader.receive(None, k, step(PROMPT, 0))
    for low, high in ((0, 2), (2, 7), (7, S)):
        reader.append(k[:, :, low:high], v[:, :, low:high])
        bulk.append(k[:, :, low:high], v[:, :, low:high])
    means = reader.units.means
    assert means is not None
    for number in range(5):
        members = [at for at, run in enumerate(RUNS) if run == number]
        close(means[:, :, number], k[:, :, members].mean(2))


def test_a_dropped_entry_takes_no_number_away() -> None:
    """Entry 2, which ended the first sentence, is dropped: entry 3 still begins the second one."""
    k, v = draw(1, K, S, D), draw(1, K, S, D, seed=1)
    reader = Reader(spec(), Place(0, 0, tuple(range(K)), Board()))
    reader.receive(None, k, step(PROMPT, 0))
    left = torch.tensor([0, 1, 3, 6, 11]).expand(1, K, -1)
    reader.take(left)
    reader.skip(1)
    reader.append(k[:, :, left[0, 0, 1:]], v[:, :, left[0, 0, 1:]])
    assert reader.units.labels is not None
    same(reader.units.labels[0, 0], torch.tensor([0, 1, 3, 4]).int())


def test_cuts_that_cannot_be() -> None:
    with pytest.raises(InputError, match="runs need a cut"):
        spec(cut=None)
    with pytest.raises(InputError, match="needs 'apart'"):
        spec(cut="keys")
    with pytest.raises(InputError, match="cannot have runs"):
        spec(owner=torch.tensor([0]).int())
    with pytest.raises(InputError, match="all or not at all"):
        spec(tail="estimate", estimated=0.5)
    with pytest.raises(InputError, match="cannot stand for a run"):
        Reader(spec(summary="minmax"), Place(0, 0, (0,), Board()))
    with pytest.raises(InputError, match="looks at tokens"):
        Reader(spec(), Place(0, 0, (0,), Board())).receive(None, draw(1, 1, 4, D), Step(0, 1.0))
