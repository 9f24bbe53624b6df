"""Scratch memory of the GPU kernels: h = x A, partial sums, the panel. One block for each device, stream and thread.

A call takes what it needs from the start of the block, so the next call on the stream writes over it: stream order has
had it read by then. Another stream or thread has a block of its own. A block grows to what calls ask for and stays, so
calls allocate nothing but their result.

A captured CUDA graph keeps the addresses that it was captured with and may be replayed beside anything, so it never
gets a block of its thread. `with using(Workspace())` around warm-up and capture gives it blocks that nobody else has:
then a capture on the stream of the warm-up allocates nothing but results either, and the workspace has to live as long
as the graph (StepGraph keeps one). Without it scratch comes from the graph's own memory pool.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

ALIGN = 256  # bytes: what torch's allocator gives


class Workspace:
    """Blocks of scratch memory, by (device, stream)."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[torch.device, int], Tensor] = {}


class _Threads(threading.local):
    def __init__(self) -> None:
        self.workspace = Workspace()


_threads = _Threads()
_owned: contextvars.ContextVar[Workspace | None] = contextvars.ContextVar("zoact_workspace", default=None)


@contextlib.contextmanager
def using(workspace: Workspace) -> Iterator[None]:
    """Calls inside the block take their scratch memory from `workspace`."""
    token = _owned.set(workspace)
    try:
        yield
    finally:
        _owned.reset(token)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Scratch:
    """The scratch memory of one call on the current stream of `device`; whoever makes another one ends this."""

    def __init__(self, device: torch.device) -> None:
        owned = _owned.get()
        self.device, self.used = device, 0
        self.blocks = (owned or _threads.workspace).blocks
        self.key = device, _stream(device)
        self.capturing = _capturing(device)
        self.shared = owned is None

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor with anything in it, apart from what this call took before."""
        size = math.prod(shape) * dtype.itemsize
        end = self.used + -(-size // ALIGN) * ALIGN
        block = self.blocks.get(self.key)
        if self.capturing and (self.shared or block is None or end > block.numel()):
            return torch.empty(shape, dtype=dtype, device=self.device)
        if block is None or end > block.numel():
            # Twice as much at least, so that growing ends. What was taken lives on in the old block until it is read.
            with torch.inference_mode(False):  # calls outside of that mode write to it too
                block = torch.empty(1 << (end - 1).bit_length(), dtype=torch.uint8, device=self.device)
            self.blocks[self.key] = block
        start, self.used = self.used, end
        return block[start : start + size].view(dtype).view(shape)


def release() -> None:
    """Give back the blocks of this thread."""
    _threads.workspace.blocks.clear()
