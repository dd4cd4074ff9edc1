"""The look of all figures: one style, one map for magnitudes, one for depth, inks that survive greyscale.

Sizes are inches: WIDE is the text width of a two-column page, NARROW one column. Colour maps are perceptually
uniform and monotone in lightness. No global state of matplotlib is touched outside `style()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

WIDE, NARROW = 7.0, 3.4
MAGNITUDE = "magma_r"  # light is little, dark is much
INKS = ("#1b1b3a", "#c2410c", "#3b8ea5", "#8f8f8f", "#d9a404", "#9d6bb0")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKS = ("o", "s", "^", "D", "v", "x")

RC: dict[str, Any] = {
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


def heat(axis: Axes, values: torch.Tensor, *, norm: Normalize | None = None, **options: Any) -> AxesImage:
    """values [rows, columns] as a heat map with a frame; what is NaN stays white."""
    image = axis.imshow(values.numpy(), aspect=options.pop("aspect", "auto"), cmap=MAGNITUDE, norm=norm, **options)
    axis.spines[:].set_visible(True)
    return image


def groups(axis: Axes, count: int, size: int, colour: str = "0.6") -> None:
    """Thin lines between `count` groups of `size` columns each."""
    for border in range(1, count):
        axis.axvline(border * size - 0.5, color=colour, linewidth=0.5)


def whole(*axes: Axes) -> None:
    """Ticks of the x axes only at whole numbers, as for layers."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def depth(layers: int) -> Colormap:
    """Colour by depth: call it with layer / (L − 1). Dark is the first layer; the palest tones are left out."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](torch.linspace(0, 0.92, max(2, layers)).numpy()))


def depth_bar(figure: Figure, axes: Sequence[Axes], layers: int) -> None:
    """The colour bar that goes with `depth`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(0, max(1, layers - 1)), depth(layers))
    bar(figure, scale, axes, "layer")


def bar(figure: Figure, scale: Any, axes: Sequence[Axes] | Axes, label: str) -> None:
    """A slim colour bar to the right of `axes`."""
    made = figure.colorbar(scale, ax=axes, label=label, pad=0.02, aspect=30)
    made.outline.set_linewidth(0.6)  # type: ignore[operator]
