"""The mask algebra: immutable expressions, and the block maps they compile to."""

from attlas.masks.block_map import BlockMap
from attlas.masks.cell_patterns import Blocks, BlockWindow, Random
from attlas.masks.explicit import Dense, PerHead
from attlas.masks.expr import All, Mask, Nothing
from attlas.masks.geometry import Axis, Grid, Segment
from attlas.masks.leaves import Causal, Dilated, Fixed, Local, Padding, Prefix, Sinks, Strided, Window
from attlas.masks.position_sets import Documents, Global

__all__ = [
    "All",
    "Axis",
    "BlockMap",
    "BlockWindow",
    "Blocks",
    "Causal",
    "Dense",
    "Dilated",
    "Documents",
    "Fixed",
    "Global",
    "Grid",
    "Local",
    "Mask",
    "Nothing",
    "Padding",
    "PerHead",
    "Prefix",
    "Random",
    "Segment",
    "Sinks",
    "Strided",
    "Window",
]
