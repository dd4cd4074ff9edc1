"""The trace: what `profile` saw of one model, as one file of statistics.

Header: model fingerprint, corpora (with their hashes), which samples are in, whether the run was complete.
Tensors: `<statistic>/<accumulator>`. Traces of the same model merge statistic by statistic. It does not know how
statistics are observed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvtool import files, registry
from kvtool.errors import InputError
from kvtool.model import Geometry
from kvtool.statistics._base import Statistic

SCHEMA = 1


def geometry(fingerprint: dict[str, Any]) -> Geometry:
    """The geometry inside a fingerprint."""
    fields = {name: value for name, value in fingerprint.items() if name != "weights"}
    return Geometry(**{**fields, "windows": tuple(fields["windows"])})


def statistic(name: str) -> type[Statistic]:
    """The class of a statistic by its name; raises InputError with a suggestion."""
    module = registry.module("statistics", name, "statistic")
    return next(
        value for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Statistic) and value.__module__ == module.__name__
    )  # fmt: skip


@dataclass
class Trace:
    """`source`: the model's name as given; `statistics` by name; `corpora` maps a corpus kind to the provenance
    of each part; `done` lists sample digests by kind; `weight` says how tokens count (`statistics/_weights.py`)."""

    model: dict[str, Any]
    source: str = ""
    statistics: dict[str, Statistic] = field(default_factory=dict)
    corpora: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    done: dict[str, list[str]] = field(default_factory=dict)
    complete: bool = True
    weight: str = "uniform"

    @property
    def geometry(self) -> Geometry:
        return geometry(self.model)

    def need(self, *names: str) -> None:
        """Raise InputError unless the trace holds these statistics."""
        missing = [name for name in names if name not in self.statistics]
        if missing:
            raise InputError(
                f"the trace has no statistic {missing[0]!r}",
                got=", ".join(sorted(self.statistics)) or "none",
                remedy="profile again with " + " ".join(f"--stat {name}" for name in missing),
            )

    def __getitem__(self, name: str) -> Statistic:
        self.need(name)
        return self.statistics[name]

    def merge(self, other: Trace) -> None:
        """Fold `other` in; raises InputError for another model or weight, or for samples that both have seen."""
        if self.model != other.model:
            differing = [key for key in self.model if self.model[key] != other.model.get(key)]
            raise InputError("the traces are of different models", got=f"different {', '.join(differing)}")
        if self.weight != other.weight:
            raise InputError(
                "the traces weigh tokens differently", got=f"{self.weight} and {other.weight}",
                remedy="profile again with one --weight",
            )  # fmt: skip
        for kind, samples in other.done.items():
            shared = set(samples) & set(self.done.get(kind, []))
            used_twice = [
                name for name, stat in self.statistics.items() if name in other.statistics and stat.corpus == kind
            ]
            if shared and used_twice:
                raise InputError(
                    f"both traces have seen the same {kind} samples",
                    got=f"{len(shared)} of them twice in {used_twice[0]!r}",
                    remedy="profile different text, or another --seed",
                )
            self.done[kind] = sorted(set(self.done.get(kind, [])) | set(samples))
        for name, stat in other.statistics.items():
            if name in self.statistics:
                self.statistics[name].merge(stat)
            else:
                self.statistics[name] = stat
        for kind, parts in other.corpora.items():
            merged = {part["hash"]: part for part in self.corpora.get(kind, []) + parts}
            self.corpora[kind] = [merged[key] for key in sorted(merged)]
        self.complete = self.complete and other.complete

    def write(self, path: str, *, force: bool = False) -> str:
        """Write the trace; returns the path."""
        header = {
            "kind": "trace",
            "schema": SCHEMA,
            "model": self.model,
            "source": self.source,
            "statistics": sorted(self.statistics),
            "corpora": self.corpora,
            "done": self.done,
            "complete": self.complete,
            "weight": self.weight,
        }
        tensors = {
            f"{name}/{key}": tensor for name, stat in self.statistics.items() for key, tensor in stat.tensors().items()
        }
        return files.write(path, header, tensors, force=force)


def read(path: str) -> Trace:
    """Read a trace; raises InputError for anything that is not a whole trace of this schema."""
    header, tensors = files.read(path, kind="trace", schema=SCHEMA)
    try:
        trace = Trace(header["model"], header["source"], {}, header["corpora"], header["done"], header["complete"])
        trace.weight = header.get("weight", trace.weight)  # traces of before there were weights have none
        for name in header["statistics"]:
            stat = statistic(name)(None, trace.geometry)
            prefix = f"{name}/"
            stat.restore({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
            trace.statistics[name] = stat
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is a damaged trace", got=f"no {error}") from error
    return trace
