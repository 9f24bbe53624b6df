"""bitsandbytes: our codes are its codes, our D(W) has its bits, and its layers come and go byte for byte."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from zoact_kernels.formats import FORMATS, PackedWeight
from zoact_kernels.integrations.bitsandbytes import from_linear4bit, is_linear4bit, to_linear4bit
from zoact_kernels.layouts import pack_nibbles
from zoact_kernels.quantize import quantize

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def without_torch_compile() -> Iterator[None]:
    """Some of its CPU paths go through torch.compile: minutes of compiling for nothing that is tested here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def swapped(packed: Tensor) -> Tensor:
    return (packed >> 4 | packed << 4).reshape(-1)


def plain_dequantize(codes: Tensor, absmax: Tensor, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' plain torch back end, which its native one stands in for."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    table = bnb.functional.get_4bit_type(packed.format, device="cpu")
    shape = (packed.out_features, packed.in_features)
    return _dequantize_4bit_compute(codes.reshape(-1), absmax, table, packed.group_size, shape, dtype)


def hostile_weight(N: int, K: int, table: tuple[float, ...]) -> Tensor:
    """Normal weights, with exact table entries, exact midpoints and their neighbours, zeros, and rows of all scales."""
    w = torch.randn(N, K)
    values = torch.tensor(sorted(table))
    ties = (values[:-1] + values[1:]) / 2
    near = torch.cat((values, ties, ties.nextafter(torch.tensor(2.0)), ties.nextafter(torch.tensor(-2.0)), -ties))
    flat = w.view(-1)
    count = min(len(near), flat.numel() // 2)
    flat[:count] = near[:count]
    flat[0] = 1.0
    if N > 6:
        w[1] = 0
        w[2] *= 1e-30
        w[3] *= 1e30
        w[4] *= 1e-41  # subnormal absmax
        w[5, :] = -3.0
    return w


@pytest.mark.parametrize("format", ("nf4", "fp4"))
@pytest.mark.parametrize("blocksize", (32, 64, 128, 256, 512, 1024, 2048, 4096))
def test_quantize_is_theirs(format: str, blocksize: int) -> None:
    for i, (N, K) in enumerate(
        ((1, 1), (1, 7), (7, 8), (16, 63), (65, 64), (7, 100), (100, 193), (16, 576), (3, 4096))
    ):
        w = hostile_weight(N, K, FORMATS[format].table)
        for dtype in {torch.float32, DTYPES[i % 3]}:
            v = w.clamp(-6e4, 6e4).to(dtype)
            theirs, state = bnb.functional.quantize_4bit(v, blocksize=blocksize, quant_type=format)
            ours = quantize(v, format, blocksize, flat=True)
            assert ours.scale is not None
            case = (N, K, dtype)
            assert ours.flat == (K % blocksize != 0), case
            assert torch.equal(ours.weight.reshape(-1), swapped(theirs)), case
            assert torch.equal(ours.scale.reshape(-1), state.absmax), case
            for out in DTYPES:
                assert torch.equal(ours.dequantize(out), plain_dequantize(theirs, state.absmax, ours, out)), (case, out)


@pytest.mark.parametrize("format", ("nf4", "fp4"))
@pytest.mark.parametrize("K", (93, 128))
def test_ties_are_theirs(format: str, K: int) -> None:
    """Weights at thresholds times an odd absmax: they multiply whole blocks by 1 / absmax and divide the short one."""
    values = torch.tensor(sorted(FORMATS[format].table))
    ties = ((values[:-1] + values[1:]) / 2).repeat(7)[: K - 1]
    absmax = 1 + torch.rand(200, 1)
    for shift in (-1, 0, 1):
        w = torch.cat((absmax, absmax * ties * (1 + shift * 2.0**-23)), dim=1)
        for row in w:  # each a short block, or a whole one
            theirs, _ = bnb.functional.quantize_4bit(row[None], blocksize=128, quant_type=format)
            assert torch.equal(quantize(row[None], format, 128, flat=True).weight.reshape(-1), swapped(theirs))


@pytest.mark.parametrize("format", ("nf4", "fp4"))
@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_theirs(format: str, nested: bool, dtype: torch.dtype) -> None:
    """dequantize_4bit itself, native code and all, through a layer: every blocksize that divides K, and flat ones."""
    for N, K, blocksize in ((64, 64, 64), (7, 100, 64), (100, 192, 32), (5, 193, 64), (65, 576, 64), (70, 1024, 128),
                            (3, 4096, 4096), (33, 2048, 1024), (1, 7, 32)):  # fmt: skip
        module = quantized(N, K, format, nested, dtype, blocksize)
        packed = from_linear4bit(module)
        theirs = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        if theirs.shape != (N, K):  # it transposes a [1, 1] of packed bytes
            theirs = theirs.reshape(N, K)
        assert packed.dequantize(dtype).dtype == theirs.dtype
        assert torch.equal(packed.dequantize(dtype), theirs), (N, K, blocksize)
        assert packed.flat == (K % blocksize != 0)
        if not packed.flat:
            assert torch.equal(packed.to_layout("cpu").dequantize(dtype), theirs)


def quantized(
    N: int, K: int, format: str = "nf4", nested: bool = True, dtype: torch.dtype = torch.float32, blocksize: int = 64
) -> nn.Module:
    """A Linear4bit, quantised as its users do: by moving it to a device."""
    module = bnb.nn.Linear4bit(K, N, bias=True, compress_statistics=nested, quant_type=format)
    module.weight.blocksize = blocksize
    module.weight.data = torch.randn(N, K, dtype=dtype)
    module = module.to("cpu")
    assert module.weight.quant_state.blocksize == blocksize and module.weight.quant_state.nested == nested
    return module


@pytest.mark.parametrize(("N", "K"), ((16, 576), (7, 64), (65, 64)))
def test_flat_blocks_fit_the_weights(N: int, K: int) -> None:
    """Where its native kernel reads another block's absmax (K % blocksize != 0), ours is the reading that fits."""
    module = bnb.nn.Linear4bit(K, N, bias=False, compress_statistics=False, quant_type="nf4")
    module.weight.blocksize = 128
    w = torch.randn(N, K) * torch.logspace(0, 2, N)[:, None]
    module.weight.data = w.clone()
    module = module.to("cpu")
    packed = from_linear4bit(module)
    assert packed.flat and packed.scale is not None
    assert torch.equal(packed.dequantize(), plain_dequantize(module.weight.data, packed.scale, packed, torch.float32))
    theirs = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    assert (packed.dequantize() - w).norm() <= min((theirs - w).norm(), 0.12 * w.norm())


@pytest.mark.parametrize("format", ("nf4", "fp4"))
@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize(("N", "K"), ((64, 128), (7, 100), (3, 7)))
def test_there_and_back(format: str, nested: bool, N: int, K: int) -> None:
    """The identical bytes, statistics and outputs; and the module we read is left as it was."""
    module = quantized(N, K, format, nested)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    packed = from_linear4bit(module)
    back = to_linear4bit(packed if packed.flat else packed.to_layout("cpu"), module.bias, torch.float32)
    assert is_linear4bit(back)
    after = back.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]) and torch.equal(after[name], tensor), name
    again = from_linear4bit(back)
    for name, tensor in packed.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
    x = torch.randn(3, K)
    if K % 2 == 0:
        assert torch.equal(back.train()(x), module.train()(x))
    assert not back.weight.requires_grad
    back.weight.data.zero_()
    module.weight.data.zero_()
    assert torch.equal(packed.dequantize(), again.dequantize()) and packed.dequantize().any()  # no memory is shared


def test_other_storage() -> None:
    """quant_storage is only another view of the same bytes (FSDP asks for bf16)."""
    w = torch.randn(64, 64)
    packs = []
    for storage in (torch.uint8, torch.bfloat16, torch.float32):
        module = bnb.nn.Linear4bit(64, 64, quant_type="nf4", quant_storage=storage)
        module.weight.data = w.clone()
        packs.append(from_linear4bit(module.to("cpu")))
    assert all(
        torch.equal(p.weight, packs[0].weight) and torch.equal(p.dequantize(), packs[0].dequantize()) for p in packs
    )


@pytest.mark.parametrize("format", ("nf4", "fp4"))
@pytest.mark.parametrize("nested", (False, True))
def test_repacked_for_its_cpu_kernel(format: str, nested: bool) -> None:
    """An eval-mode forward may have repacked the weight; the codes are the same and absmax is the bf16 one."""
    module = quantized(64, 256, format, nested, torch.bfloat16)
    fresh = from_linear4bit(module)
    repacked = bnb.functional._convert_weight_packed_for_cpu
    module.weight.data, module.weight.quant_state = repacked(module.weight.data, module.weight.quant_state)
    packed = from_linear4bit(module)
    assert torch.equal(packed.weight, fresh.weight)
    assert packed.scale is not None and packed.scale.dtype == torch.bfloat16 and packed.nested is None
    assert torch.equal(packed.scale, fresh.scales().bfloat16())
    if bnb.functional.has_avx512bf16():
        x = torch.randn(5, 256).bfloat16()
        theirs = module.eval()(x).float() - (module.bias if module.bias is not None else 0)
        ours = x.float() @ packed.dequantize().T
        assert (theirs - ours).abs().max() < 0.02 * ours.abs().max()


def test_forward_in_eval_mode_first() -> None:
    """On a CPU with AVX512-BF16 that forward repacks the weight, elsewhere not; the codes are the same either way."""
    module = quantized(64, 128, "nf4", True, torch.bfloat16)
    fresh = from_linear4bit(module)
    module.eval()(torch.randn(2, 128).bfloat16())
    repacked = getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    assert bool(repacked) == bnb.functional.has_avx512bf16()
    assert torch.equal(from_linear4bit(module).weight, fresh.weight)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="`module` is a Linear; from_linear4bit takes"):
        from_linear4bit(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="`module` is not quantised yet"):
        from_linear4bit(bnb.nn.Linear4bit(64, 64))
    module = quantized(8, 64)
    module.weight.quant_state.code = module.weight.quant_state.code + 0.01
    with pytest.raises(ValueError, match="`module` has a codebook of its own; allowed is that of nf4"):
        from_linear4bit(module)
    module = quantized(8, 64)
    module.weight.quant_state.state2.blocksize = 128
    with pytest.raises(ValueError, match="`module` has a nested blocksize of 128; allowed is 256"):
        from_linear4bit(module)
    w = torch.randn(8, 96)
    for packed, message in (
        (quantize(w, "int4"), "`packed` is int4; Linear4bit holds nf4 and fp4"),
        (quantize(w, "nf4", 96), r"`packed` has group_size 96; blocksizes of bitsandbytes are \(32, 64"),
        (quantize(w, "nf4", 64), "`packed` has rows of K=96 that end in a short group of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            to_linear4bit(packed)
    assert from_linear4bit(to_linear4bit(quantize(w, "nf4", 64, flat=True))).flat
    assert from_linear4bit(to_linear4bit(quantize(w, "fp4", 32, scale_dtype=torch.float16))).groups == 3


def test_recognised_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_linear4bit(bnb.nn.LinearNF4(64, 64)) and not is_linear4bit(nn.Linear(4, 4))
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    assert not is_linear4bit(nn.Linear(4, 4)) and "bitsandbytes" not in sys.modules


def test_pack_nibbles_is_their_bytes_swapped() -> None:
    theirs, _ = bnb.functional.quantize_4bit(torch.tensor([[1.0, -1.0, 0.5, 0.0]]), blocksize=32, quant_type="nf4")
    codes = quantize(torch.tensor([[1.0, -1.0, 0.5, 0.0]]), "nf4", 32).codes()
    assert codes.tolist() == [[15, 0, 12, 7]]
    assert torch.equal(pack_nibbles(codes, 7).reshape(-1), swapped(theirs))
