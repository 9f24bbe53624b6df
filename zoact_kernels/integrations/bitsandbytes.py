"""bitsandbytes' 4-bit layers taken over byte for byte, and given back: nothing is dequantised or quantised again.

    packed = from_linear4bit(module)      # bnb.nn.Linear4bit, nf4 or fp4, with or without compress_statistics
    module = to_linear4bit(packed, bias)

A packed byte of bitsandbytes holds the earlier weight in its high nibble, ours in the low one: nibbles are swapped,
codes and absmax stay. Where K % blocksize != 0 its blocks run across rows and the weight is held flat (`formats`).
`packed.dequantize` has the bits of `bitsandbytes.functional.dequantize_4bit`, with one exception, a bug of its native
CPU kernel (seen in 0.50.2): for some K % blocksize != 0 it reads the absmax of other blocks; ours then are the bits of
its plain torch back end, which fit its codes.

Quantisation in bitsandbytes happens on the way to a device: `module.to("cpu")` quantises a fresh Linear4bit on the CPU.
On a CPU with AVX512-BF16 the first forward in eval mode repacks the weight, rounds absmax to bf16 and forgets the
nested statistics; such a module is taken over with the bf16 absmax it then computes with.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..formats import FORMATS, PackedWeight
from ..layouts import pack_nibbles

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256  # absmax values that share a second absmax


def is_linear4bit(module: nn.Module) -> bool:
    """Whether `module` is a bitsandbytes Linear4bit; bitsandbytes is not imported to find out."""
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(module, bnb.nn.Linear4bit)


def from_linear4bit(module: nn.Module) -> PackedWeight:
    """The weight of a quantised Linear4bit, layout `row`, on its device; the module stays as it is.

    ValueError for another module, one that has not been quantised yet, and statistics bitsandbytes itself never makes.
    """
    if not is_linear4bit(module):
        raise ValueError(f"`module` is a {type(module).__name__}; from_linear4bit takes a bitsandbytes.nn.Linear4bit")
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise ValueError(
            "`module` is not quantised yet; bitsandbytes does that in module.to('cpu') or module.to('cuda')"
        )
    if state.quant_type not in ("nf4", "fp4"):
        raise ValueError(f"`module` has quant_type {state.quant_type!r}; allowed are nf4 and fp4")
    table = torch.tensor(FORMATS[state.quant_type].table, dtype=torch.float32)
    if state.code is not None and not torch.equal(state.code.cpu(), table):
        raise ValueError(f"`module` has a codebook of its own; allowed is that of {state.quant_type}")
    N, K = state.shape
    flat = K % state.blocksize != 0
    groups = -1 if flat else K // state.blocksize
    data = weight.data.reshape(-1).contiguous().view(torch.uint8)
    if getattr(state, "packing_format_for_cpu", False):
        packed = pack_nibbles(_unpack_cpu(data, N, K), 0)
        scale, nested = state.absmax.T.contiguous(), None
    else:
        packed = _swap_nibbles(data) if flat else _swap_nibbles(data).view(N, K // 2)
        scale = state.absmax.clone() if flat else state.absmax.reshape(N, groups).clone()
        nested = _nested(state) if state.nested else None
    return PackedWeight(state.quant_type, "row", state.blocksize, N, K, packed, scale, None, nested)


def to_linear4bit(
    packed: PackedWeight,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
) -> Linear4bit:
    """A quantised bnb.nn.Linear4bit with the codes and statistics of `packed`: the bytes `from_linear4bit` has read.

    dtype is what bitsandbytes dequantises to; 16-bit scales become fp32, which is exact. ValueError for formats other
    than nf4 and fp4, a group_size bitsandbytes doesn't know, and rows that end in a short group (its blocks run on).
    """
    import bitsandbytes as bnb

    if packed.format not in ("nf4", "fp4"):
        raise ValueError(f"`packed` is {packed.format}; Linear4bit holds nf4 and fp4")
    if packed.span not in BLOCKSIZES:
        raise ValueError(f"`packed` has group_size {packed.span}; blocksizes of bitsandbytes are {BLOCKSIZES}")
    if not packed.flat and packed.in_features % packed.span:
        raise ValueError(
            f"`packed` has rows of K={packed.in_features} that end in a short group of {packed.span}; Linear4bit needs"
            " K % group_size = 0, or blocks that run across rows: quantize(..., flat=True)"
        )
    row = packed.to_layout("row")
    assert row.scale is not None
    absmax, offset, state2 = row.scale.reshape(-1), None, None
    if row.nested is None:
        absmax = absmax.to(torch.float32, copy=True)
    else:
        code, offset, absmax2 = row.nested[:256].clone(), row.nested[256].clone(), row.nested[257:].clone()
        state2 = bnb.functional.QuantState(absmax=absmax2, blocksize=NESTED_BLOCKSIZE, code=code, dtype=torch.float32)
        absmax = absmax.clone()
    device = row.weight.device
    state = bnb.functional.QuantState(
        absmax=absmax,
        shape=torch.Size((row.out_features, row.in_features)),
        code=bnb.functional.get_4bit_type(row.format, device=device),
        blocksize=row.span,
        quant_type=row.format,
        dtype=dtype,
        offset=offset,
        state2=state2,
    )
    nested = row.nested is not None
    module = bnb.nn.Linear4bit(
        row.in_features, row.out_features, bias is not None, compute_dtype, nested, row.format, device="meta"
    )
    module.weight = bnb.nn.Params4bit(
        _swap_nibbles(row.weight.reshape(-1)).view(-1, 1),
        quant_state=state,
        blocksize=row.span,
        compress_statistics=nested,
        quant_type=row.format,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return module


def _swap_nibbles(data: Tensor) -> Tensor:
    return data >> 4 | data << 4


def _nested(state: Any) -> Tensor:
    """fp32 [257 + ceil(scales / 256)]: code values, offset, second absmax."""
    if state.state2.blocksize != NESTED_BLOCKSIZE:
        raise ValueError(f"`module` has a nested blocksize of {state.state2.blocksize}; allowed is {NESTED_BLOCKSIZE}")
    parts = (state.state2.code, state.offset.reshape(1), state.state2.absmax.reshape(-1))
    return torch.cat([part.to(state.absmax.device, torch.float32) for part in parts])


def _unpack_cpu(data: Tensor, N: int, K: int) -> Tensor:
    """Codes [N, K] of the layout its AVX512-BF16 kernel reads.

    Blocks of 32 rows, pairs of k, 32 bytes: byte 2 i + j holds (row i, k + j) low and (row i + 16, k + j) high.
    """
    packed = data.view(N // 32, K // 2, 1, 16, 2)
    return torch.cat((packed & 15, packed >> 4), dim=2).permute(0, 2, 3, 1, 4).reshape(N, K)
