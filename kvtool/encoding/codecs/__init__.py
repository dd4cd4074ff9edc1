"""The codec: how the numbers of one side are written down. One kind a file; `_base.py` says what each must do."""

from kvtool.encoding.codecs._base import Codec, Parts
from kvtool.encoding.codecs._groups import written
from kvtool.encoding.codecs.affine import Affine
from kvtool.encoding.codecs.delta import Delta
from kvtool.encoding.codecs.levels import Levels
from kvtool.encoding.codecs.nested import Nested
from kvtool.encoding.codecs.polar import Polar
from kvtool.encoding.codecs.raw import FLOATS, Raw
from kvtool.encoding.codecs.sketched import Sketched
from kvtool.encoding.codecs.slerp import Slerp
from kvtool.encoding.codecs.split import Split
from kvtool.encoding.codecs.ternary import Ternary
from kvtool.encoding.codecs.with_keys import SIDES, WithKeys

__all__ = [
    "FLOATS", "SIDES", "Affine", "Codec", "Delta", "Levels", "Nested", "Parts", "Polar", "Raw", "Sketched", "Slerp",
    "Split", "Ternary", "WithKeys", "written",
]  # fmt: skip
