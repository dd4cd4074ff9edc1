"""The look of all figures: one style, one map for magnitudes, one for depth, inks that survive greyscale.

Sizes are inches: WIDE is the text width of a two-column page, NARROW one column. Colour maps are perceptually
uniform and monotone in lightness. No global state of matplotlib is touched outside `style()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, LogNorm, Normalize
    from matplotlib.figure import Figure

WIDE, NARROW = 7.0, 3.4
MAGNITUDE = "magma_r"  # light is little, dark is much
INKS = ("#1b1b3a", "#c2410c", "#3b8ea5", "#7b3f8f", "#d9a404", "#a8a8a8")
FILLS = ("#1b1b3a", "#7a8fb5", "#dfc27d")  # of bars: dark, middle, light
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "-")
MARKS = ("o", "s", "^")

RC: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "image.interpolation": "nearest",
    "figure.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save within this context."""
    from matplotlib import rc_context  # kept out of the start-up of commands that draw nothing

    with rc_context(RC):
        yield


def panels(figure: Figure, rows: int, columns: int, width: float, height: float, **options: Any) -> list[Axes]:
    """`rows` × `columns` axes in reading order on a figure of this size."""
    figure.set_size_inches(width, height)
    return list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def heats(
    figure: Figure,
    axes: Sequence[Axes],
    matrices: Mapping[str, torch.Tensor],
    label: str,
    norm: Normalize,
    extent: tuple[float, float, float, float] | None = None,
    aspect: Literal["auto", "equal"] = "auto",
) -> None:
    """Heat maps [rows, columns] by title, framed, with one scale and one colour bar; NaN stays white. Without an extent
    rows and columns are counted, as layers and heads are."""
    from matplotlib.ticker import MaxNLocator

    images = [
        axis.imshow(values.numpy(), aspect=aspect, cmap=MAGNITUDE, norm=norm, extent=extent)
        for axis, values in zip(axes, matrices.values(), strict=True)
    ]
    for axis, title in zip(axes, matrices, strict=True):
        axis.set_title(title)
        axis.spines[:].set_visible(True)
        if extent is None:
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar(figure, images[0], axes, label)


def linear(most: float = 1.0) -> Normalize:
    """A scale from 0 to `most`."""
    from matplotlib.colors import Normalize

    return Normalize(0, most)


def logarithmic(*values: torch.Tensor) -> LogNorm:
    """A logarithmic scale of the positive values, from their first percentile to the largest."""
    from matplotlib.colors import LogNorm

    positive = torch.cat([part[part > 0].flatten() for part in values]).double().sort().values
    if not len(positive):
        return LogNorm(0.1, 1.0, clip=True)
    low, high = float(positive[len(positive) // 100]), float(positive[-1])
    return LogNorm(low, max(high, 1.1 * low), clip=True)


def line(index: int) -> dict[str, Any]:
    """The look of the line `index` of a plot with marks."""
    return {"color": INKS[index], "linestyle": DASHES[index], "marker": MARKS[index]}


def groups(axis: Axes, count: int, size: int, colour: str = "0.3") -> None:
    """Thin lines between `count` groups of `size` columns each."""
    for border in range(1, count):
        axis.axvline(border * size - 0.5, color=colour, linewidth=0.6)


def whole(*axes: Axes) -> None:
    """Ticks of the x axes only at whole numbers, as for layers."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def depth(layers: int) -> Colormap:
    """Colour by depth: call it with layer / (L − 1). Dark is the first layer; the palest are left out."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](torch.linspace(0, 0.92, max(2, layers)).numpy()))


def depth_bar(figure: Figure, axes: Sequence[Axes], layers: int) -> None:
    """The colour bar that goes with `depth`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    scale = ScalarMappable(Normalize(0, max(1, layers - 1)), depth(layers))
    bar(figure, scale, axes, "layer").locator = MaxNLocator(integer=True)


def bar(figure: Figure, scale: Any, axes: Sequence[Axes], label: str) -> Colorbar:
    """A slim colour bar to the right of `axes`."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogFormatter

    made = figure.colorbar(scale, ax=axes, label=label, pad=0.02, fraction=0.05, aspect=30)
    made.outline.set_linewidth(0.6)
    if isinstance(scale.norm, LogNorm):  # 0.1, 1, 10 and not powers
        made.formatter = FuncFormatter(lambda value, _: f"{value:g}")
        made.minorformatter = LogFormatter(minor_thresholds=(2, 1))
    return made
