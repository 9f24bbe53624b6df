"""Scratch memory: nothing is handed out twice in a call, blocks grow and stay, a capture neither grows nor frees."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from zoact_kernels import workspace
from zoact_kernels.workspace import Scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_blocks() -> Iterator[None]:
    workspace.release()
    yield
    workspace.release()


def capture(monkeypatch: pytest.MonkeyPatch, now: bool) -> None:
    monkeypatch.setattr(workspace, "_capturing", lambda device: now)


def block_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5, 7), (1000, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_take(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scratch = Scratch(CPU)
    taken = [scratch.take(*shape, dtype=dtype) for _ in range(5)]
    for number, tensor in enumerate(taken):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0  # kernels read and write 16 bytes at a time
        tensor.fill_(number)
    for number, tensor in enumerate(taken):
        assert (tensor == number).all(), "handed out twice"


def test_a_later_call_takes_the_same_memory() -> None:
    first = Scratch(CPU)
    for size in (1000, 5000, 60000):  # grows twice
        first.take(size)
    addresses = []
    for _ in range(2):
        scratch = Scratch(CPU)
        addresses.append([scratch.take(size).data_ptr() for size in (1000, 5000, 60000)])
    assert addresses[0] == addresses[1]


def test_growing_leaves_what_was_taken() -> None:
    scratch = Scratch(CPU)
    small = scratch.take(10).fill_(3)
    scratch.take(100_000).fill_(4)
    assert (small == 3).all()


def test_a_block_made_in_inference_mode_serves_outside() -> None:
    with torch.inference_mode():
        Scratch(CPU).take(8, 8)
    y = torch.mm(torch.ones(8, 8), torch.ones(8, 8), out=Scratch(CPU).take(8, 8))
    assert (y == 8).all()


def test_streams_and_threads_have_blocks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Scratch(CPU).take(8)
    monkeypatch.setattr(workspace, "_stream", lambda device: 1)
    beside = Scratch(CPU).take(8)
    other: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: other.append(Scratch(CPU).take(8)))
    thread.start()
    thread.join()
    assert len({block_of(t) for t in (here, beside, other[0])}) == 3


def test_a_capture_never_shares_the_block_of_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(Scratch(CPU).take(1000))
    capture(monkeypatch, True)
    assert block_of(Scratch(CPU).take(10)) != block
    capture(monkeypatch, False)
    assert block_of(Scratch(CPU).take(1000)) == block


def test_a_capture_takes_from_the_workspace_of_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    own, shared = workspace.Workspace(), block_of(Scratch(CPU).take(1000))
    with workspace.using(own):
        block = block_of(Scratch(CPU).take(1000))  # warm-up
        capture(monkeypatch, True)
        scratch = Scratch(CPU)
        assert block_of(scratch.take(500)) == block != shared
        assert block_of(scratch.take(100_000)) != block
        assert block_of(scratch.take(10)) == block, "what did not fit has moved the block"
        capture(monkeypatch, False)
    assert block_of(Scratch(CPU).take(1000)) == shared, "a later call writes where the graph does"
    assert [block_of(kept) for kept in own.blocks.values()] == [block], "a capture has grown the block"
