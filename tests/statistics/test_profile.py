"""The streaming pass: what it leaves of the model's own answers, in any dtype, and when it is interrupted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from kvtool.corpus.base import Corpus, Sample, gather
from kvtool.model import Model
from kvtool.profile import profile
from kvtool.trace import Trace, statistic
from tests import models
from tests.corpora import corpora, text
from tests.statistics.observed import STATISTICS, trace
from tests.tolerance import close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = models.build("llama")
    model.network.to(dtype)
    made = trace(model, corpora(model))
    for name in STATISTICS:
        for key, tensor in made[name].state.items():
            assert not bool(torch.isnan(tensor.double()).any()), (name, key)


def test_bf16_and_fp32_see_about_the_same() -> None:
    fp32 = models.build("llama")
    bf16 = models.build("llama")
    bf16.network.to(torch.bfloat16)
    for which, key in (("attention", "entropy"), ("channels", "v.absolute"), ("gram", "k_pre")):
        first, second = (trace(model, {"text": text(model)}, [which])[which][key] for model in (fp32, bf16))
        close(second / first.abs().max(), first / first.abs().max(), torch.bfloat16)


def test_only_what_is_asked_for(llama: Model) -> None:
    made = trace(llama, corpora(llama), ["gram"])
    assert list(made.statistics) == ["gram"]
    assert list(made.done) == ["text"]  # no statistic listens to the others


def test_an_interrupted_profile_resumes(llama: Model) -> None:
    whole = trace(llama, {"text": text(llama)}, ["gram", "maps"])
    broken = Trace(
        llama.fingerprint, llama.name, {name: statistic(name)(llama, llama.geometry) for name in ("gram", "maps")}
    )

    def stop(kind: str, sample: Sample) -> None:
        raise KeyboardInterrupt

    corpus: Corpus = text(llama)
    with pytest.raises(KeyboardInterrupt):
        profile(llama, broken, {"text": corpus}, progress=stop)
    assert len(broken.done["text"]) == 1
    half = copy.deepcopy(broken.done["text"])
    profile(llama, broken, {"text": corpus})
    assert broken.done["text"][:1] == half
    assert broken.done == whole.done
    for name in ("gram", "maps"):
        for key, tensor in whole[name].state.items():
            close(broken[name][key], tensor, torch.float32)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox"])
def test_samples_in_one_pass_are_each_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepacking: a row of short samples leaves the trace that a pass for each would leave."""
    model = models.double(name)
    samples = tuple(Sample(models.random_ids(1, n, seed=n)[0], "text") for n in (31, 5, 70, 12, 5))
    made, passes = [], []
    for room in (2048, 1):
        monkeypatch.setattr("kvtool.profile.ROW", room)
        count, plain = [0], model.network.base_model.forward

        def counted(*args: Any, count: list[int] = count, plain: Any = plain, **kwargs: Any) -> Any:
            count[0] += 1
            return plain(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(model.network.base_model, "forward", counted)
            names = [other for other in STATISTICS if statistic(other).corpus == "text"]
            made.append(trace(model, {"text": gather("text", samples, seed=0, options={})}, names))
        passes.append(count[0])
    assert passes[0] < passes[1]
    packed, apart = made
    assert packed.done == apart.done
    for name in packed.statistics:
        for key, tensor in apart[name].state.items():
            finite = tensor.double().isfinite()
            assert torch.equal(packed[name].state[key].double().isfinite(), finite)
            close(packed[name].state[key].double()[finite], tensor.double()[finite], torch.float32)
