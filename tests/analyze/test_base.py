"""What every finding owes: a table that fits, JSON, figures, and a clear word about what is missing."""

from __future__ import annotations

import json

import pytest
import torch
from matplotlib.image import imread

from kvtool import registry
from kvtool.analyze import _base
from kvtool.errors import InputError
from tests.analyze.traces import blank, random

NAMES = registry.names("analyze")


def test_the_entries():
    assert NAMES == ["channels", "heads", "key-norms", "layers", "locality", "recall", "sharing", "sinks", "spectra"]
    for name in NAMES:
        needs = registry.module("analyze", name, "finding").STATISTICS
        assert set(needs) <= set(registry.names("statistics"))


@pytest.mark.parametrize("layers", [1, 3, 80])
@pytest.mark.parametrize("name", NAMES)
def test_the_table_fits_a_terminal(name, layers):
    finding = _base.run(random(layers=layers), name)
    lines = [[str(cell) for cell in line] for line in (finding.columns, *finding.rows)]
    assert finding.name == name
    assert {len(line) for line in lines} == {len(finding.columns)}
    assert sum(max(map(len, column)) + 2 for column in zip(*lines, strict=True)) <= 100
    assert len(finding.rows) <= 40
    assert finding.headline.endswith(".")
    assert "nan" not in finding.headline


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_data_is_json(name, layers):
    data = _base.run(random(layers=layers), name).data
    assert json.loads(json.dumps(data, allow_nan=False)) == data


@pytest.mark.parametrize("name", NAMES)
def test_the_same_trace_gives_the_same_finding(name):
    one, other = (_base.run(random(), name) for _ in range(2))
    assert (one.headline, one.rows, one.data) == (other.headline, other.rows, other.data)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_figures_are_pictures(name, layers, tmp_path):
    finding = _base.run(random(layers=layers), name)
    paths = _base.save_figures(finding, tmp_path / "new" / "folder", dpi=50)
    assert len(paths) == len(finding.figures) >= 1
    for path, stem in zip(paths, finding.figures, strict=True):
        assert path == str(tmp_path / "new" / "folder" / f"{stem}.png")
        picture = imread(path)  # refuses what is no PNG
        assert min(picture.shape[:2]) >= 80
        assert picture[..., :3].std() > 0.01


def test_figures_are_not_overwritten(tmp_path):
    finding = _base.run(random(), "sinks")
    (path,) = _base.save_figures(finding, tmp_path, dpi=50)
    with pytest.raises(InputError, match=f"{path} exists"):
        _base.save_figures(finding, tmp_path, dpi=50)
    assert _base.save_figures(finding, tmp_path, dpi=50, force=True) == [path]


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write figures"):
        _base.save_figures(_base.run(random(), "sinks"), tmp_path / "file", dpi=50)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_statistic_is_named(name):
    needs = registry.module("analyze", name, "finding").STATISTICS
    with pytest.raises(InputError, match=f"no statistic '{needs[0]}'.*--stat {needs[0]}"):
        _base.run(random("maps"), name)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_trace_is_refused(name):
    with pytest.raises(InputError, match=r"seen nothing|are empty"):
        _base.run(blank(*registry.names("statistics")), name)


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(InputError, match="Did you mean 'spectra'"):
        _base.run(random(), "spectrum")
    with pytest.raises(InputError, match="unknown finding"):
        _base.run(random(), "_base")


def test_numbers_for_json_and_for_tables():
    values = torch.tensor([[1 / 3, float("nan")], [float("-inf"), 12345678.0]], dtype=torch.float64)
    assert _base.plain(values) == [[0.33333, None], [None, 12346000.0]]
    assert _base.plain(torch.tensor([1, 2])) == [1, 2]
    assert [_base.cell(0.456), _base.cell(12.6, 0), _base.cell(float("nan"))] == [0.46, 13, "–"]
    assert str(_base.cell(-0.001)) == "0.0"


def test_tables_of_deep_models_skip_layers():
    assert _base.shown(3) == [0, 1, 2]
    assert _base.shown(80)[:3] == [0, 3, 6]
    assert _base.shown(80)[-1] == 79
    assert all(len(_base.shown(layers)) <= 37 for layers in range(1, 200))
