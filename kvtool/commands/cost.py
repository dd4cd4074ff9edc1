"""`kvtool cost`: a model, a plan and a device → users, prefill, decode step, context switch, by context length."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvtool import files, plan
from kvtool.analyze._base import DPI
from kvtool.analyze._figures import style
from kvtool.commands._console import note, progress, size, table
from kvtool.commands._shelf import find
from kvtool.cost import figure as drawing
from kvtool.cost import hardware
from kvtool.cost.formulas import Cost, Network, Service
from kvtool.cost.ledger import Measured, depends, measure, whole
from kvtool.errors import InputError
from kvtool.model import Model, load
from kvtool.plan import Plan

FULL = "full"
FORMATS = (".png", ".pdf", ".svg")
COLUMNS = ("tokens", "cache", "held", "users", "prefill", "step", "faster", "switch", "tokens/s")


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    model: str
    plan: str | None
    hardware: str
    lengths: str
    batch: int
    generated: int
    share: float
    figure: str | None
    seed: int
    device: str
    dtype: str
    force: bool


def run(request: Request) -> dict[str, Any]:
    """Returns the record that `--json` prints."""
    lengths, device = _lengths(request.lengths), hardware.find(request.hardware)
    _check(request)
    device.speed(request.dtype)
    read = None if request.plan is None else plan.read(find(request.plan))
    if read is not None and read.draft is not None:
        raise InputError("a plan that drafts costs what its proposals are worth, which no ledger says",
                         remedy="pass the plan that it was composed with")  # fmt: skip
    model = load(request.model, dtype=request.dtype, device=request.device)
    if read is not None:
        read.check(model.fingerprint)
    caches: dict[str, Plan | None] = {FULL: None} | ({} if read is None else {read.method: read})
    measured: dict[str, Measured] = {}
    with progress("cost", len(caches)) as advance:
        for name, one in caches.items():
            measured[name] = measure(model, one, lengths, seed=request.seed)
            advance(name)
    service = Service(network(model), device, request.dtype, request.share, request.batch, request.generated)
    record = _record(request, service, caches, measured, lengths)
    _show(record, service)
    if request.figure is not None:
        _draw(request.figure, record)
    return record


def network(model: Model) -> Network:
    """What the formulas need of a model."""
    geometry, own = model.geometry, model.network
    table = own.get_input_embeddings().weight
    head = own.get_output_embeddings()
    apart = head is not None and head.weight is not table  # one row of it is read for a token
    parameters = list(own.parameters())  # a tied table comes once
    weights = sum(parameter.nbytes for parameter in parameters)
    return Network(
        weights=weights,
        streamed=weights - apart * table.nbytes,
        multiplied=sum(parameter.numel() for parameter in parameters) - apart * table.numel(),
        windows=geometry.windows,
        query_heads=geometry.query_heads,
        head_dim=geometry.head_dim,
        group=geometry.group,
    )


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise InputError("bad --lengths", got=text, expected="tokens, like 4000,32000") from error
    if not lengths or lengths[0] < 16:
        raise InputError("bad --lengths", got=text, expected="one context of 16 tokens or more")
    return lengths


def _check(request: Request) -> None:
    if request.batch < 1 or request.generated < 1:
        raise InputError("bad --batch or --generate", got=f"{request.batch}, {request.generated}", expected="1 or more")
    if not 0 < request.share <= 1:
        raise InputError("bad --share", got=request.share, expected="more than 0, at most 1")
    if request.figure is not None:
        if Path(request.figure).suffix not in FORMATS:
            raise InputError("bad --figure", got=request.figure, expected="a name that ends in " + " or ".join(FORMATS))
        files.check_output(request.figure, force=request.force, option="--figure")


def _record(
    request: Request,
    service: Service,
    caches: dict[str, Plan | None],
    measured: dict[str, Measured],
    lengths: list[int],
) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, one in caches.items():
        mine = replace(service, network=_attending(service.network, one))
        rows[name] = [_row(tokens, mine, measured[FULL], measured[name]) for tokens in lengths]
    even = {name: seen.break_even(service.network.streamed, service.batch) for name, seen in measured.items()}
    return {
        "kind": "cost",
        "model": request.model,
        "plan": request.plan,
        "dtype": request.dtype,
        "hardware": asdict(service.hardware),
        "network": asdict(service.network),
        "assumed": {"batch": service.batch, "generated": service.generated, "share": service.share},
        "costs": rows,
        "break_even": even,
        "ledger": {
            name: {
                "measured": sorted(seen.at), "anchors": list(seen.anchors), "deviation": seen.deviation,
                "exact": seen.deviation == 0 and whole(caches[name]),
                "depends": depends(caches[name]),
            }
            for name, seen in measured.items()
        },
        "figure": request.figure,
    }  # fmt: skip


def _attending(network: Network, one: Plan | None) -> Network:
    """Layers that a plan drops attend to nothing, and a prompt's queries read what it says."""
    if one is not None and one.keep is not None:
        kept = zip(network.windows, one.keep.gone.tolist(), strict=True)
        network = replace(network, windows=tuple(0 if gone else window for window, gone in kept))
    return network if one is None or one.read is None else replace(network, prefill=one.read.prefill)


def _row(tokens: int, service: Service, full: Measured, seen: Measured) -> dict[str, Any]:
    cache, whole = seen(tokens), full(tokens)
    cost: Cost = service.cost(tokens, cache)
    faster = service.step(whole, service.batch) / cost.step
    return {"tokens": tokens, **asdict(cache), **asdict(cost), "faster": faster, "most": service.most(whole)}


def _show(record: dict[str, Any], service: Service) -> None:
    device, network = service.hardware, service.network
    note(
        f"{record['model']} in {record['dtype']} on {device.name}: weights {size(network.weights)} of "
        f"{service.share:.0%} of {size(device.memory)}; steps of {service.batch} sequence{'s' * (service.batch > 1)}; "
        f"tokens/s: all users, {service.generated} tokens after each prompt\n"
    )
    costs = record["costs"]
    lines = [
        (row["tokens"] if name == FULL else "", name, size(row["held"]), row["users"], _time(row["prefill"]),
         _time(row["step"]), f"{row['faster']:.2f}×", _time(row["switch"]),
         f"{row['tokens_per_second']:.0f}" if row["users"] else "–")
        for rows in zip(*costs.values(), strict=True) for name, row in zip(costs, rows, strict=True)
    ]  # fmt: skip
    table("cost", COLUMNS, lines)
    for name, even in record["break_even"].items():
        where = f"from {even:,.0f} tokens on" if math.isfinite(even) else "at no length"
        note(f"{name}: the cache is as much to read as the weights {where}")
    last = costs[FULL][-1]
    note(f"no cache makes a step of {last['tokens']} tokens more than {last['most']:.2f}× faster")
    for name, ledger in record["ledger"].items():
        low, _, high = ledger["anchors"]
        off = ledger["deviation"]
        close = "exact there" if ledger["exact"] else f"within {off:.1e}" if off else "exact but for rounded shares"
        note(f"{name}: bytes of a cache of random entries; beyond {low} tokens a line to {high}, {close}")
        if ledger["depends"]:
            note(f"note: {', '.join(ledger['depends'])} of {name} look at the text; these are the bytes of noise")


def _time(seconds: float) -> str:
    for unit, least in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= least:
            return f"{seconds / least:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"


def _draw(path: str, record: dict[str, Any]) -> None:
    from matplotlib.figure import Figure  # slow to import, and tables do not need it

    even = {name: value if math.isfinite(value) else None for name, value in record["break_even"].items()}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with style():
            figure = Figure(layout="constrained")
            drawing.draw(figure, record["costs"], even)
            figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise InputError(f"cannot write the figure {path}", got=error.strerror) from error
