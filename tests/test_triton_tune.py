"""Tuned tables: what is tried, what is kept, what is refused; with a clock of our own, no GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zoact_kernels import cli
from zoact_kernels.dispatch import Problem
from zoact_kernels.triton_ops import Triton, tiles, tune
from zoact_kernels.triton_ops.tiles import Shape, Tile, linear_rule, linear_tile

pytest.importorskip("triton")
SHAPE = Shape("sm_90", "bfloat16", "int4", 200, 4096, 14336)


@pytest.fixture(autouse=True)
def rules_again() -> Iterator[None]:
    yield
    tiles.load(None, "")


def no_words(_: str) -> None:
    pass


@pytest.mark.parametrize("product", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", ["int4", "nf4", "flat", "dense"])
@pytest.mark.parametrize("M", [1, 16, 17, 64, 65, 5000])
def test_only_what_no_bit_depends_on_is_tried(product: str, format: str, M: int) -> None:
    s = Shape("sm_90", product, format, M, 4096, 4096)
    rule, *others = tune.candidates(s)
    assert rule == linear_tile(s)
    assert len(others) == len(set(others)) > 0
    for tile in others:
        assert (tile.BN, tile.BK) == (rule.BN, rule.BK)
        assert tile.BM in tiles.ROWS
        assert s.bucket >= tile.BM


@pytest.mark.parametrize("arch", ["", "sm_80", "sm_90", "gfx942"])
def test_steps_of_k_do_not_follow_m_or_the_architecture(arch: str) -> None:
    """What a row's bits depend on, BK among it: the same for every M, on every device."""
    for product in ("float32", "tf32", "bfloat16"):
        for format in ("int4", "flat", "dense"):
            found = {linear_rule(Shape(arch, product, format, M, 512, 512)).BK for M in (1, 16, 17, 33, 64, 1000)}
            assert found == {linear_rule(Shape("sm_80", product, format, 1, 512, 512)).BK}


def test_the_fastest_is_kept_where_it_is_worth_it() -> None:
    fast = linear_rule(SHAPE)._replace(BM=128, warps=8, stages=4)

    def seconds(s: Shape, tile: Tile) -> float:
        if tile.stages == 5:
            raise RuntimeError("out of shared memory")
        return (0.5 if s.K == SHAPE.K else 0.99) if tile == fast else 1.0

    (big, small) = tune.tune([SHAPE, SHAPE._replace(M=129), SHAPE._replace(K=4096)], seconds, no_words)
    assert (big["BM"], big["warps"], big["stages"], big["bucket"]) == (128, 8, 4, 256), "of M = 200 and 129, one bucket"
    rule = linear_rule(SHAPE)
    assert (small["BM"], small["warps"], small["stages"]) == (rule.BM, rule.warps, rule.stages), (
        "1 % is the clock's noise"
    )


def test_no_tile_runs() -> None:
    def seconds(s: Shape, tile: Tile) -> float:
        raise RuntimeError("out of shared memory")

    with pytest.raises(RuntimeError, match="no tile of"):
        tune.tune([SHAPE], seconds, no_words)


def table(tmp_path: Path, **changes: Any) -> Path:
    entries = tune.tune([SHAPE], lambda s, tile: 1.0 / (tile.BM * tile.warps * tile.stages), no_words)
    path = tmp_path / "folder" / "tiles.json"
    tune.write(path, "sm_90", [entries[0] | changes.pop("entry", {})])
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_load(tmp_path: Path) -> None:
    rule = linear_tile(SHAPE)
    assert tiles.load(table(tmp_path), "sm_90") == 1
    assert linear_tile(SHAPE) == rule._replace(BM=128, warps=8, stages=5)
    assert linear_tile(SHAPE._replace(M=256)) == linear_tile(SHAPE)
    for other in (SHAPE._replace(M=257), SHAPE._replace(N=4097), SHAPE._replace(format="nf4")):
        assert linear_tile(other) == linear_rule(other)
    assert tiles.load(None, "sm_90") == 0
    assert linear_tile(SHAPE) == rule
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["tiles.json"], "a temporary file is left"


def test_dispatch_does_not_follow_a_table(tmp_path: Path) -> None:
    """Or ranks with different tables would run different implementations, whose bits differ."""
    problem = Problem("zo_linear", "cuda", torch.bfloat16, 200, 4096, 14336, "int4", arch="sm_90")
    cost = Triton().cost(problem)
    tiles.load(table(tmp_path), "sm_90")
    assert Triton().cost(problem) == cost


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arch="sm_80"), r"is for sm_80 and Triton .*; this is sm_90 .*run `zoact tune` here"),
        (dict(triton="1.0"), r"and Triton 1\.0; this is"),
        (dict(kind="weights"), "its kind is 'weights'"),
        (dict(tiles={}), "is no table of tiles"),
        (dict(entry=dict(BM=48)), "entry 0 of .* is no tile"),
        (dict(entry=dict(BM="64")), "entry 0 of .* is no tile"),
        (dict(entry=dict(stages=True, warps=0)), "entry 0 of .* is no tile"),
        (dict(entry=dict(N=-1)), "entry 0 of .* is no tile"),
        (dict(entry=dict(K=None)), "entry 0 of .* is no tile"),
        (dict(tiles=[3]), "entry 0 of .* is no tile"),
    ],
)
def test_a_bad_or_foreign_table_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tiles.load(table(tmp_path), "sm_90")
    before = linear_tile(SHAPE)
    with pytest.raises(ValueError, match=message):
        tiles.load(table(tmp_path, **changes), "sm_90")
    assert linear_tile(SHAPE) == before, "a refused table has changed something"


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00\xff"])
def test_no_table_at_all(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tiles.json"
    for _ in range(2):  # missing, then senseless
        with pytest.raises(ValueError, match="is no table of tiles"):
            tiles.load(path, "sm_90")
        path.write_text(content, encoding="latin-1")


def zoact(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(("tune", *arguments))
    return int(end.value.code or 0)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.hardware, "arch_here", lambda: "sm_90")
    monkeypatch.setattr(tune, "on_gpu", lambda: lambda s, tile: 1.0 / tile.warps)
    path = tmp_path / "tiles.json"
    assert zoact("--shapes", "4096x14336, 64x64", "--rows", "1,16,200", "--out", str(path)) == 0
    assert "4 tiles in" in capsys.readouterr().out, "two shapes, two buckets"
    assert tiles.load(path, "sm_90") == 4
    assert linear_tile(SHAPE).warps == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "8x8"), "torch sees no GPU here"),
        (("--shapes", "8x"), "`--shapes` has '8x'"),
        ((), "one of the two"),
        (("--shapes", "8x8", "--rows", "1,0"), "`--rows` is '1,0'"),
        (("--shapes", "8x8", "--dtype", "int8"), "`--dtype` is 'int8'"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.hardware, "arch_here", lambda: "")
    assert zoact(*arguments) == 2
    said = capsys.readouterr()
    assert message in " ".join((said.out + said.err).split())


def test_default_path() -> None:
    path = tune.default_path("sm_90")
    assert path.is_absolute()
    assert "sm_90" in path.name
    assert path != tune.default_path("sm_80")
