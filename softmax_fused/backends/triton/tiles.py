"""How much one program takes at a time: every tile size of the kernels, in one table that a benchmark can override."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


class Tile(NamedTuple):
    """What one program takes at a time: `rows` rows, their classes in blocks of `classes`.

    A long row has a program of its own (or several, see `split_rows`): `lanes` threads take `vector` neighbouring
    classes each, as many times as a block needs. Tiles of several rows have no lanes. `whole`: a block holds a row.
    """

    rows: int
    classes: int
    warps: int
    lanes: int = 0
    vector: int = 0
    whole: bool = False

    def constants(self) -> tuple[bool, int, int, int]:
        """Return WHOLE, CLASSES, LANES and VECTOR of a kernel."""
        return self.whole, self.classes, self.lanes or self.rows, self.vector


class LongTile(NamedTuple):
    """The tile for rows of up to `row_bytes`: so many warps, and so many vectors of 16 bytes a thread in a block."""

    row_bytes: float
    warps: int
    vectors: int


class Tables(NamedTuple):
    """The tile sizes that depend on the GPU, which `override` replaces."""

    # Four vectors a thread keep 40 KB and more under way on every SM, what HBM needs; the running maximum costs one EX2
    # for all of them.
    one_pass: tuple[LongTile, ...] = (
        LongTile(4096, 1, 2),
        LongTile(8192, 1, 4),
        LongTile(32768, 2, 4),
        LongTile(math.inf, 4, 4),
    )
    # Loss and gradient in one launch read a row twice, the second time from the L2 cache: the longer the rows, the more
    # threads work on each, so that those under way take at most 256 KB an SM, 34 of the 50 MB of an H100. A row of more
    # has an SM to itself.
    two_pass: tuple[LongTile, ...] = (
        LongTile(4096, 1, 2),
        LongTile(8192, 1, 4),
        LongTile(16384, 2, 4),
        LongTile(32768, 4, 4),
        LongTile(65536, 8, 4),
        LongTile(math.inf, 32, 4),
    )
    long_row_classes: int = 128  # rows of more classes are long: a warp has enough to do with one
    contiguous_class_block: int = 16  # classes a block in shorter rows, one row a thread: 10 classes are one block
    strided_class_block: int = 4  # the same where classes lie apart in memory: registers for 4 of a vector of pixels
    whole_row_bytes: int = 32768  # long rows of up to so many bytes stay in registers, if they fill three quarters
    whole_row_lane_classes: int = 32  # so many classes of such a row are a thread's
    whole_strided_classes: int = 8  # the most classes that lie apart and stay in registers from the load to the store
    target_programs: int = 512  # these keep every SM of the largest GPUs busy: below, tiles shrink and rows are split
    single_program_rows: int = 256  # rows that one program takes at once, so that loss and reduction are one launch
    weight_programs: int = 128  # programs that sum a mean's denominator, each a part
    row_block: int = 128  # rows a program, of kernels that read a few numbers a row


tables = Tables()
WARP = 64 if torch.version.hip else 32
VECTOR_BYTES = 16  # the widest load


def power_of_2(least: int) -> int:
    """Return the power of 2 from `least` on; Triton's own function costs a microsecond."""
    return 1 << (least - 1).bit_length()


CACHES: list[Any] = []
"""Of functions that depend on the tile sizes."""


def use(other: Tables) -> None:
    """Use other tile sizes from now on: what was decided before is forgotten."""
    global tables
    tables = other
    for cache in CACHES:
        cache.cache_clear()


@contextlib.contextmanager
def override(**sizes: Any) -> Iterator[None]:
    """Use other tile sizes, named as in `Tables`, within the block."""
    before = tables
    use(before._replace(**sizes))
    try:
        yield
    finally:
        use(before)


def long_tile(
    classes: int, itemsize: int, table: tuple[LongTile, ...], streams: int = 1, crowded: bool = False
) -> Tile:
    """Return the tile for one long row; `streams` such rows are read at once.

    `crowded`: what a kernel keeps of each class leaves registers for half as many.
    """
    vector = VECTOR_BYTES // itemsize
    block = max(power_of_2(classes // vector), WARP) * vector
    if block * itemsize <= tables.whole_row_bytes and 4 * classes >= 3 * block:
        lanes = max(WARP, block * max(streams, 1 + crowded) // tables.whole_row_lane_classes)
        return Tile(1, block, lanes // WARP, lanes, vector, True)
    warps, vectors = next(entry[1:] for entry in table if classes * itemsize * streams <= entry.row_bytes)
    vectors = max(1, vectors // 2) if crowded else vectors
    warps = min(warps, 16) if itemsize == 8 else warps  # 32 warps leave a thread 64 registers: float64 needs more
    return Tile(1, vectors * vector * WARP * warps, warps, WARP * warps, vector)


def choose_tile(classes: int, sizes: tuple[int, ...], classes_adjacent: bool, itemsize: int) -> Tile:
    """Return the tile for rows of `sizes` (outer..., inner), not long ones."""
    rows, inner = math.prod(sizes), sizes[-1]
    block = tables.contiguous_class_block if classes_adjacent else tables.strided_class_block
    block = min(block, power_of_2(classes))
    if classes_adjacent and rows == inner <= tables.single_program_rows and classes <= block:
        return Tile(power_of_2(rows), block, max(1, power_of_2(rows) // WARP), whole=classes <= block)
    width = WARP if classes_adjacent else WARP * VECTOR_BYTES // itemsize
    warps = 4
    while warps > 1 and (rows < tables.target_programs * width * warps or inner < width * warps):
        warps //= 2
    return Tile(min(power_of_2(inner), width * warps), block, warps, whole=classes <= block)


def split_rows(rows: int, classes: int, block: int) -> int:
    """Return over how many programs to split each long row: more than one where rows are few and blocks many."""
    return max(1, min(tables.target_programs // rows, classes // (2 * block)))
