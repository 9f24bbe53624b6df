"""A packed weight put together from panels of rows, so that no more than one panel ever exists twice."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..formats import PackedWeight, expected_shapes
from ..layouts import BLOCK


def assemble(panels: Iterable[PackedWeight], out_features: int, layout: str) -> PackedWeight:
    """Panels of 64 n rows each (the last of any) in layout `row`, top to bottom, as one weight in `layout`.

    64 rows are one block of layout `cpu` and four tiles of `cuda`, which stand one after the other, so a panel's
    storage is a slice of the whole weight's, and every panel goes straight to its place.
    """
    stored: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    rows = 0
    for row_panel in panels:
        if rows % BLOCK:
            raise ValueError(f"`panels` has one that ends at row {rows}; all but the last take multiples of {BLOCK}")
        panel = row_panel.to_layout(layout)
        for name, piece in panel.tensors.items():
            if name not in stored:
                stored[name] = _whole(name, piece, panel, out_features)
            start = filled.get(name, 0)
            filled[name] = start + piece.shape[0]
            stored[name][start : filled[name]] = piece
        rows += panel.out_features
    if rows != out_features:
        raise ValueError(f"`panels` have {rows} rows together; `out_features` is {out_features}")
    return PackedWeight(panel.format, layout, panel.group_size, out_features, panel.in_features, **stored)


def _whole(name: str, piece: Tensor, panel: PackedWeight, out_features: int) -> Tensor:
    """Uninitialised storage for `out_features` rows, given that of one panel."""
    shapes = expected_shapes(panel.format, panel.layout, panel.group_size, out_features, panel.in_features)
    return piece.new_empty(shapes[0] if name == "weight" else shapes[1])
