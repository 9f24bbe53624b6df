"""Scratch memory of the GPU kernels: h = x A, partial sums, the panel. One block for each device, stream and thread.

A call takes what it needs from the start of the block, so the next call on the stream writes over it: stream order has
had it read by then. Another stream or thread has a block of its own. A block grows to what calls ask for and stays, so
calls allocate nothing but their result, inside a captured CUDA graph too. There nothing grows: what does not fit comes
from the graph's own memory; all fits after a warm-up on the stream that captures (`torch.cuda.graph(g, stream=s)`).

A graph keeps the addresses that it was captured with. A block that one has seen is never freed, and whoever replays a
graph beside other work on the stream that captured it lets two calls write to one block.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

ALIGN = 256  # bytes: what torch's allocator gives
_blocks = threading.local()
_captured: list[Tensor] = []  # blocks whose addresses stand in a graph


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Scratch:
    """The scratch memory of one call on the current stream of `device`; whoever makes another one ends this."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.used = device, 0
        self.blocks: dict[Any, Tensor] = _blocks.__dict__
        self.key = device, _stream(device)

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor with anything in it, apart from what this call took before."""
        size = math.prod(shape) * dtype.itemsize
        end = self.used + -(-size // ALIGN) * ALIGN
        block = self.blocks.get(self.key)
        if block is None or end > block.numel():
            if _capturing(self.device):
                return torch.empty(shape, dtype=dtype, device=self.device)
            # Twice as much at least, so that growing ends. What was taken lives on in the old block until it is read.
            with torch.inference_mode(False):  # calls outside of that mode write to it too
                block = torch.empty(1 << (end - 1).bit_length(), dtype=torch.uint8, device=self.device)
            self.blocks[self.key] = block
        if _capturing(self.device) and not any(block is kept for kept in _captured):
            _captured.append(block)
        start, self.used = self.used, end
        return block[start : start + size].view(dtype).view(shape)


def release() -> None:
    """Give back the blocks of this thread, but those that a captured graph writes to."""
    _blocks.__dict__.clear()
