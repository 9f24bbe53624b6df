"""Which tile runs: committed rules over (architecture, dtype, format, N, K, M bucket), or a table that the user loaded.
No measurement at run time, no Triton import; every rank of a run on equal devices decides alike.

What a row's bits depend on - the steps of K, the number of splits, the operand that holds the weight, tf32 or not - is
a function of the dtype, the format, N and K alone: equal for every M and in every tuned table. Only the number of rows
of x in a tile, warps and pipeline stages follow M, the architecture and the table. Between architectures bits differ
all the same: each has its own tensor cores.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

K_STEP = 128  # splits and chunks of K start at multiples of this
CHUNK = 512  # k in one partial sum of h = x A
CODES = ("int4", "nf4", "fp4", "int8")  # formats of a byte or less a weight


class Tile(NamedTuple):
    """BN weights' rows x BM rows of x, BK a step; `warps` and `stages` as Triton understands them."""

    BN: int
    BM: int
    BK: int
    warps: int
    stages: int


def pow2_divisor(value: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `value`."""
    align = 1
    while align < limit and value % (2 * align) == 0:
        align *= 2
    return align


def rank_tile(R: int) -> int:
    """Columns of C or Z at a time: tl.dot takes 16 or more."""
    return 16 if R <= 16 else 32


def splits(N: int, K: int) -> tuple[int, int]:
    """(number of splits, k in each): enough programs for one tile of x to fill a device, none shorter than CHUNK."""
    count = max(1, min(128 * 64 // max(N, 1), K // CHUNK, 16))
    size = -(-K // (count * K_STEP)) * K_STEP
    return -(-K // size) if K else 1, max(size, K_STEP)


def chunk_parts(M: int, K: int) -> tuple[int, int]:
    """(parts of h = x A that lie in memory, chunks of K summed in each): parts beside one another where rows alone, 32
    a program, do not fill a device of some 130 multiprocessors. The order of the chunks is the same either way."""
    chunks = max(1, -(-K // CHUNK))
    parts = chunks if M <= 1024 else 1
    return parts, chunks // parts


class Shape(NamedTuple):
    """What the tile of a product may depend on."""

    arch: str  # as Problem.arch; "" on the CPU
    product: str  # what x . W^T is multiplied in: "float32", "tf32", "bfloat16", "float16"
    format: str  # of the weight, "flat" where its blocks run across rows
    M: int
    N: int
    K: int

    @property
    def bucket(self) -> int:
        """M rounded up to a power of two from 16 to 4096: tiles are equal within."""
        return min(max(16, 1 << (self.M - 1).bit_length()), 4096)


# What a tuned table may hold beside the rule's BN and BK.
ROWS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), range(1, 9)
KIND = "zoact_kernels tiles"

# What `load` brought: (product, format, N, K, bucket) -> (BM, warps, stages).
_tuned: dict[tuple[str, str, int, int, int], tuple[int, int, int]] = {}


def _key(s: Shape) -> tuple[str, str, int, int, int]:
    return s.product, s.format, s.N, s.K, s.bucket


def linear_tile(s: Shape) -> Tile:
    """The tile of zo_linear: of the table that was loaded, else of the rule."""
    rule = linear_rule(s)
    BM, warps, stages = _tuned.get(_key(s), (rule.BM, rule.warps, rule.stages))
    return rule._replace(BM=BM, warps=warps, stages=stages)


@contextlib.contextmanager
def using(s: Shape, tile: Tile) -> Iterator[None]:
    """Run shapes like s with the BM, warps and stages of `tile` inside the block."""
    before = dict(_tuned)
    _tuned[_key(s)] = tile.BM, tile.warps, tile.stages
    try:
        yield
    finally:
        _tuned.clear()
        _tuned.update(before)


def load(path: Path | str | None, arch: str) -> int:
    """Use the table that `zoact tune` wrote for GPUs `arch` ("sm_90") from now on, in this process; None: the rules
    again. Returns the number of its entries.

    Raises:
        ValueError: no such table, one of another GPU or Triton, or an entry that is none; nothing changes then.
    """
    found = {}
    for number, entry in enumerate(_entries(Path(path), arch) if path is not None else ()):
        try:
            *key, BM, warps, stages = (entry[name] for name in (*_KEY, "BM", "warps", "stages"))
            product, format, *sizes = key
            good = isinstance(product, str) and isinstance(format, str) and all(type(v) is int and v > 0 for v in sizes)
            good = good and BM in ROWS and warps in WARPS and stages in STAGES
        except (KeyError, TypeError):
            good = False
        if not good:
            raise ValueError(f"entry {number} of {path} is no tile: {entry}; write the table anew with `zoact tune`")
        found[(product, format, *sizes)] = BM, warps, stages
    _tuned.clear()
    _tuned.update(found)
    return len(found)


_KEY = ("product", "format", "N", "K", "bucket")


def _entries(path: Path, arch: str) -> list[dict[str, Any]]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        kind, of, triton, entries = (table[name] for name in ("kind", "arch", "triton", "tiles"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of tiles: {error!r}; `zoact tune` writes one") from error
    if kind != KIND or not isinstance(entries, list):
        raise ValueError(f"{path} is no table of tiles: its kind is {kind!r}; `zoact tune` writes one")
    if (of, triton) != (arch, version("triton")):
        raise ValueError(
            f"{path} is for {of} and Triton {triton}; this is {arch or 'no GPU'} and Triton {version('triton')}; "
            "run `zoact tune` here"
        )
    return entries


def linear_rule(s: Shape) -> Tile:
    """Half precision and tf32: 64 rows of the weight are what one warp group multiplies from registers (wgmma), and the
    weight is the left operand on every target, so that M changes the width of an instruction, never its depth. fp32 has
    no tensor core: its tiles are small because both operands and the sums live in registers. Flat blocks address every
    element, tf32 has four bytes of each. Few rows are bound by the weight's bytes: more of them are on their way.
    128 rows and 8 warps have 43 instructions beside an HGMMA instead of 58, but one program a multiprocessor: `tune`
    may pick them.
    """
    if s.product == "float32":
        return Tile(32, 16, 32, 4, 2) if s.bucket <= 16 else Tile(64, 32, 32, 4, 2)
    BK = 32 if s.format == "flat" or s.product == "tf32" else 64
    stages = 2 if s.arch.startswith("gfx") else 5 if s.bucket <= 16 and s.format in CODES else 3
    if s.arch == "sm_120" and s.bucket == 32 and s.format in ("nf4", "fp4"):
        stages = 2  # with 3 ptxas spills 16 bytes
    return Tile(64, min(s.bucket, 64), BK, 4, stages)


def dense_tile(s: Shape) -> Tile:
    """The tile of zo_dense_linear: narrower, since Z and its parts live in registers beside the sums, and those of an
    fp16 x too."""
    if s.product == "float32":
        return Tile(32, min(s.bucket, 32), 32, 4, 2)
    stages = 2 if s.arch.startswith("gfx") else 3
    return Tile(64, 16 if s.product in ("float16", "tf32") else min(s.bucket, 32), 32, 4, stages)
