"""Who is timed at zo_linear: our op, PyTorch as a competent user would write it, and the peers + ZO side path in torch.

A provider is a function (case, data) -> call(i) -> y [M, N], where i picks a weight of the ring; it raises Unsupported
with the reason where it can't serve a case. Peers are installed only for benchmarking (`make bench-peers`), serve the
CPU, and keep scales in fp32 where they can, so all read the same weight. The other ops: updates.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zoact_kernels import ops, rng
from zoact_kernels.dispatch import IMPLEMENTATIONS, Problem
from zoact_kernels.formats import FORMATS, LAYOUTS, PackedWeight
from zoact_kernels.layers import ZOLinear

from .cases import Case

PARAM_ID = 1234
SIGMA = 1e-3
SIGMA_HALF = 0.25  # 16-bit rounding would hide a missing Z of 1e-3 from the gate
Call = Callable[[int], Any]


class Unsupported(Exception):
    """This provider can't serve this case; the message says why."""


@dataclass
class Data:
    """Tensors of a case. `ring` holds the weights in layout row; `seeds` one seed a pair of groups."""

    x: Tensor  # [M, K], of mean 3 like activations after a gate
    ring: list[PackedWeight]
    basis: Tensor | None  # [K, R]
    coeff: Tensor | None  # [N, R]
    seeds: Tensor | None  # int64 [S]
    sigmas: Tensor | None  # fp32 [G, S]
    noise: list[Tensor] | None = None  # set for the correctness gate: the very Z of our seeds instead of torch.randn


def make_data(case: Case, ring_bytes: float = 3e8) -> Data:
    """Random operands; codes are drawn, not quantised, since only their time matters."""
    generator = torch.Generator(case.device).manual_seed(0)
    count = 1 if case.residency == "cache" else int(ring_bytes / case.packed_bytes) + 1
    ring = [_weight(case, generator) for _ in range(count)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    x = (normal(case.M, case.K) + 3).to(dtype_of(case))
    if not case.rank:
        return Data(x, ring, None, None, None, None)
    pairs = max(1, case.groups // 2)
    sigmas = torch.zeros(case.groups, pairs)
    for g in range(case.groups):
        sigmas[g, g // 2] = -sigma_of(case) if g % 2 else sigma_of(case)
    return Data(
        x,
        ring,
        torch.linalg.qr(normal(case.K, case.rank))[0].contiguous(),
        normal(case.N, case.rank) * 1e-2,
        (torch.arange(pairs) + 7).to(case.device),
        sigmas.to(case.device),
    )


def dtype_of(case: Case) -> torch.dtype:
    return getattr(torch, case.dtype)


def sigma_of(case: Case) -> float:
    return SIGMA if case.dtype == "float32" else SIGMA_HALF


def _weight(case: Case, generator: torch.Generator) -> PackedWeight:
    N, K, size, device = case.N, case.K, case.group_size, case.device
    if case.format == "dense":
        w = torch.randn(N, K, generator=generator, device=device) / K**0.5
        return PackedWeight("dense", "row", -1, N, K, w.to(dtype_of(case)))
    groups = -(-K // size)
    scale = (torch.rand(N, groups, generator=generator, device=device) + 0.5) / K**0.5

    def codes(low: int, high: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, (N, columns), generator=generator, dtype=dtype, device=device)

    if case.format == "int8":
        scale = (scale / 64).to(dtype_of(case))
        return PackedWeight("int8", "row", size, N, K, codes(-127, 128, K, torch.int8), scale)
    # int4: half precision, which every peer takes; nf4: fp32, as bitsandbytes keeps it
    scale = (scale / 4).to(dtype_of(case)) if case.format == "int4" else scale
    return PackedWeight(case.format, "row", size, N, K, codes(0, 256, -(-K // 2), torch.uint8), scale)


Provider = Callable[[Case, Data], Call]

# Our op ---------------------------------------------------------------------------------------------------------------


def _arguments(case: Case, data: Data, w: PackedWeight, param_id: Tensor) -> tuple:
    return (
        data.x, w.weight, w.scale, w.offset, None, None, None, None, data.basis, data.coeff, None, None, data.seeds,
        data.sigmas, param_id if data.seeds is not None else None, case.format, w.layout, w.group_size, case.N,
        "normal", case.groups,
    )  # fmt: skip


def _problem(case: Case, data: Data, layout: str) -> Problem:
    """What dispatch is asked for this case, were the weight stored in `layout`; an offset changes nothing here."""
    w = data.ring[0]
    return ops.linear_problem(*_arguments(case, data, w, _param_id(case)))._replace(layout=layout)


def _param_id(case: Case) -> Tensor:
    return torch.tensor([PARAM_ID], device=case.device)


def _stored_for_layers(w: PackedWeight) -> PackedWeight:
    """In the layout that a swapped model holds it in."""
    return ZOLinear.from_packed(w).packed()


def zoact(case: Case, data: Data) -> Call:
    """Our op as a model runs it: dispatch chooses."""
    ring, param_id = [_stored_for_layers(w) for w in data.ring], _param_id(case)
    return lambda i: ops.zo_linear(*_arguments(case, data, ring[i], param_id))


def chosen(case: Case, data: Data) -> str:
    """The implementation that `zoact` runs."""
    w = _stored_for_layers(data.ring[0])
    return ops.choose(ops.linear_problem(*_arguments(case, data, w, _param_id(case)))).name


def forced(name: str) -> Provider:
    """Our op by one implementation: in the layout of a swapped model, or else the first one that it reads."""
    implementation = next(i for i in IMPLEMENTATIONS if i.name == name)

    def provider(case: Case, data: Data) -> Call:
        layouts = dict.fromkeys((_stored_for_layers(data.ring[0]).layout, *LAYOUTS))
        refusals = {layout: implementation.refusal(_problem(case, data, layout)) for layout in layouts}
        layout = next((layout for layout, refusal in refusals.items() if refusal is None), None)
        if layout is None:
            raise Unsupported("; ".join(dict.fromkeys(str(refusal) for refusal in refusals.values())))
        ring, param_id = [w.to_layout(layout) for w in data.ring], _param_id(case)

        def call(i: int) -> Tensor:
            with ops.using(name):
                return ops.zo_linear(*_arguments(case, data, ring[i], param_id))

        return call

    return provider


FORCED = tuple(i.name for i in IMPLEMENTATIONS if i.name != "reference")


def foreign(device: str) -> list[str]:
    """Providers of our implementations that belong to other devices."""
    problem = Problem("zo_linear", device, torch.float32, 1, 64, 64)
    refusals = {i.name: i.refusal(problem) or "" for i in IMPLEMENTATIONS if i.name in FORCED}
    return [f"zoact {name}" for name, refusal in refusals.items() if "tensors are on" in refusal]


# PyTorch --------------------------------------------------------------------------------------------------------------


def side_path(case: Case, data: Data) -> Callable[[Tensor], Tensor]:
    """y += (x A) C^T for all rows, then sigma (x_g A) Z^T per group: one torch.randn a seed, two skinny products.

    All in the dtype of x, which is the fastest that torch offers here; our op keeps this term in fp32.
    """
    if data.basis is None:
        return lambda y: y
    dtype = dtype_of(case)
    basis, coeff, sigmas = data.basis.to(dtype), data.coeff.to(dtype), data.sigmas.tolist()
    size = case.M // case.groups

    def add(y: Tensor) -> Tensor:
        h = data.x @ basis
        y = y.addmm_(h, coeff.T)
        for s in range(len(sigmas[0])):
            if data.noise:
                z = data.noise[s].to(dtype)
            else:
                z = torch.randn(case.N, case.rank, device=case.device, dtype=dtype)
            for g in (2 * s, 2 * s + 1):
                if g < case.groups:
                    y[g * size : (g + 1) * size].addmm_(h[g * size : (g + 1) * size], z.T, alpha=sigmas[g][s])
        return y

    return add


def _dequantise(case: Case, w: PackedWeight) -> Tensor:
    """One vectorised dequantisation to the dtype of x, [N, K]."""
    N, K, size, dtype = case.N, case.K, case.group_size, dtype_of(case)
    if case.format == "dense":
        return w.weight
    if case.format == "int8":
        codes = w.weight.to(dtype)
    else:
        pairs = torch.stack((w.weight & 15, w.weight >> 4), dim=-1).view(N, -1)[:, :K]
        codes = _table(case.format, case.device, dtype)[pairs.int()] if case.format != "int4" else pairs.to(dtype) - 8
    scale = w.scale.to(dtype)
    if K % size:
        return codes * scale.repeat_interleave(size, dim=1)[:, :K]
    return (codes.view(N, -1, size) * scale.unsqueeze(-1)).view(N, K)


@functools.cache
def _table(format: str, device: str, dtype: torch.dtype) -> Tensor:
    return torch.tensor(FORMATS[format].table, device=device, dtype=dtype)


def torch_unfused(case: Case, data: Data) -> Call:
    """Dequantise, one stacked product for all groups, the side path."""
    add = side_path(case, data)
    return lambda i: add(data.x @ _dequantise(case, data.ring[i]).T)


def torch_compiled(case: Case, data: Data) -> Call:
    """The same, dequantisation and product under torch.compile."""
    add = side_path(case, data)
    torch._dynamo.reset()  # else the ninth case hits the recompile limit and runs eagerly
    product = torch.compile(lambda x, w, s: x @ _dequantise(case, _Stored(w, s)).T, dynamic=False)
    return lambda i: add(product(data.x, data.ring[i].weight, data.ring[i].scale))


@dataclass
class _Stored:
    weight: Tensor
    scale: Tensor | None


def torch_dense(case: Case, data: Data) -> Call:
    """Resident weights in the dtype of x, no dequantisation, the side path: what a user without memory limits has."""
    if case.format == "dense":
        raise Unsupported("torch unfused is that here")
    if case.residency == "rotating" and case.N * case.K * case.itemsize * len(data.ring) > 4e9:
        raise Unsupported("the dense ring is larger than 4 GB")
    ring = [w.dequantize(dtype_of(case)) for w in data.ring]
    add = side_path(case, data)
    return lambda i: add(torch.nn.functional.linear(data.x, ring[i]))


def bare(provider: Provider) -> Provider:
    """The product alone, without the side path: a floor, not the same work."""
    return lambda case, data: provider(*without_side_path(case, data))


def without_side_path(case: Case, data: Data) -> tuple[Case, Data]:
    return replace(case, rank=0, groups=1), Data(data.x, data.ring, None, None, None, None)


# Peers ----------------------------------------------------------------------------------------------------------------


def _needs(library: str) -> Any:
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise Unsupported(f"{library} is not installed") from error


def _whole_groups(case: Case, *formats: str, devices: tuple[str, ...] = ("cpu",), dtypes: str = "float32") -> None:
    if case.device not in devices:
        raise Unsupported(f"called on {' and '.join(devices)} only")
    if case.dtype not in dtypes.split():
        raise Unsupported(f"{case.dtype} activations are not called")
    if case.format not in formats:
        raise Unsupported(f"{case.format} is not among {', '.join(formats)}")
    if case.K % case.group_size:
        raise Unsupported(f"K={case.K} is no multiple of {case.group_size}")


def bitsandbytes_ring(case: Case, data: Data) -> list[tuple[Tensor, Any]]:
    """The ring as bitsandbytes stores it: (codes, its nibbles high first; quantisation state)."""
    _whole_groups(case, "nf4", devices=("cpu", "cuda"), dtypes="float32 float16 bfloat16")
    functional = _needs("bitsandbytes.functional")
    ring = []
    for w in data.ring:
        zeros = torch.zeros(case.N, case.K, device=case.device, dtype=dtype_of(case))
        state = functional.quantize_4bit(zeros, blocksize=case.group_size, quant_type="nf4")[1]
        state.absmax.copy_(w.scale.reshape(-1))
        ring.append(((w.weight >> 4 | w.weight << 4).reshape(-1, 1), state))
    return ring


def bitsandbytes_nf4(case: Case, data: Data) -> Call:
    ring, bnb = bitsandbytes_ring(case, data), _needs("bitsandbytes")
    add = side_path(case, data)
    return lambda i: add(bnb.matmul_4bit(data.x, ring[i][0].t(), quant_state=ring[i][1]))


def aten_int4_bf16(case: Case, data: Data) -> Call:
    """bf16 activations and outputs: on the CPU, against fp32 ones, another class of precision and never a peer."""
    cpu = case.device == "cpu"
    _whole_groups(case, "int4", devices=("cpu", "cuda"), dtypes="float32 bfloat16" if cpu else "bfloat16")
    if case.N % 16 or case.group_size not in (32, 64, 128, 256):
        raise Unsupported("N has to be a multiple of 16 and group_size 32, 64, 128 or 256")
    aten, ring = torch.ops.aten, []
    for w in data.ring:
        scales = torch.stack([w.scale.t(), torch.zeros_like(w.scale).t()], -1).contiguous().bfloat16()
        if cpu:
            packed = aten._convert_weight_to_int4pack_for_cpu(w.codes().int(), 1)
        else:  # its bytes hold the higher nibble first
            packed = aten._convert_weight_to_int4pack(w.weight >> 4 | w.weight << 4, 8)
        ring.append((packed, scales))
    x, add = data.x.bfloat16(), side_path(case, data)
    product = aten._weight_int4pack_mm_for_cpu if cpu else aten._weight_int4pack_mm
    return lambda i: add(product(x, ring[i][0], case.group_size, ring[i][1]).to(data.x.dtype))


def openvino(case: Case, data: Data) -> Call:
    """u4 or nf4 weights, fp32 compute, dynamic quantisation of activations off."""
    _whole_groups(case, "int4", "nf4")
    ov, op = _needs("openvino"), _needs("openvino.opset13")
    import numpy as np

    kind = ov.Type.u4 if case.format == "int4" else ov.Type.nf4
    config = {
        "INFERENCE_NUM_THREADS": case.threads, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }  # fmt: skip
    requests = []
    for w in data.ring:
        x = op.parameter([-1, case.K], ov.Type.f32)
        shape = ov.Shape([case.N, case.K // case.group_size, case.group_size])
        codes = op.convert(op.constant(ov.Tensor(w.weight.numpy().reshape(-1), shape, kind)), ov.Type.f32)
        if case.format == "int4":
            codes = op.subtract(codes, op.convert(op.constant(np.full((1, 1, 1), 8, np.uint8)), ov.Type.f32))
        scaled = op.multiply(codes, op.constant(w.scale.numpy().reshape(case.N, -1, 1)))
        dense = op.reshape(scaled, op.constant(np.array([case.N, case.K], np.int64)), False)
        model = ov.Model([op.matmul(x, dense, False, True)], [x])
        requests.append(ov.Core().compile_model(model, "CPU", config).create_infer_request())
    x_array, add = data.x.numpy(), side_path(case, data)

    def call(i: int) -> Tensor:
        y = requests[i].infer([x_array], share_inputs=True, share_outputs=True)[0]
        return add(torch.from_numpy(y)) if data.basis is not None else torch.from_numpy(y)

    return call


def onnxruntime(case: Case, data: Data) -> Call:
    """MatMulNBits at accuracy level 0 (fp32 compute), MatMulBnb4 for nf4."""
    _whole_groups(case, "int4", "nf4")
    ort = _needs("onnxruntime")
    helper, numpy_helper, proto = _needs("onnx.helper"), _needs("onnx.numpy_helper"), _needs("onnx").TensorProto
    N, K = case.N, case.K

    def session(node: Any, inits: list[Any]) -> Any:
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info("A", proto.FLOAT, ["M", K])],
            [helper.make_tensor_value_info("Y", proto.FLOAT, ["M", N])], inits,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets)
        model.ir_version = 10
        options = ort.SessionOptions()
        options.intra_op_num_threads = case.threads
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    sessions = []
    for w in data.ring:
        scale = numpy_helper.from_array(w.scale.numpy().reshape(-1), "S")
        if case.format == "int4":
            codes = w.weight.numpy().reshape(N, K // case.group_size, case.group_size // 2)
            node = helper.make_node("MatMulNBits", ["A", "B", "S"], ["Y"], domain="com.microsoft", K=K, N=N, bits=4,
                                    block_size=case.group_size, accuracy_level=0)  # fmt: skip
        else:
            codes = (w.weight >> 4 | w.weight << 4).numpy().reshape(-1)
            node = helper.make_node("MatMulBnb4", ["A", "B", "S"], ["Y"], domain="com.microsoft", K=K, N=N,
                                    block_size=case.group_size, quant_type=1)  # fmt: skip
        sessions.append(session(node, [numpy_helper.from_array(codes, "B"), scale]))
    feed, add = {"A": data.x.numpy()}, side_path(case, data)
    return lambda i: add(torch.from_numpy(sessions[i].run(None, feed)[0]))


def ark(case: Case, data: Data) -> Call:
    """auto-round-lib's kernels (successor of BesTLA), fp32 compute."""
    _whole_groups(case, "int4")
    kernel = _needs("auto_round_kernel")
    none, no_codes = torch.empty(0), torch.empty(0, dtype=torch.int8)
    ring = [
        kernel.repack_quantized_weight(
            (w.codes().to(torch.int8) - 8).t().contiguous(), w.scale.t().contiguous(), no_codes, case.group_size,
            "fp32", "int4", "fp32", False,
        )
        for w in data.ring
    ]  # fmt: skip
    add = side_path(case, data)
    return lambda i: add(
        kernel.woqgemm(data.x, ring[i], none, case.N, case.K, case.group_size, "fp32", "int4", "fp32", False)
    )


PROVIDERS: dict[str, Provider] = {
    "zoact": zoact,
    **{f"zoact {name}": forced(name) for name in FORCED},
    "torch unfused": torch_unfused,
    "torch compiled": torch_compiled,
    "torch dense": torch_dense,
    "dense product": bare(torch_dense),
    "aten int4 product": bare(aten_int4_bf16),
    "bitsandbytes": bitsandbytes_nf4,
    "aten int4 bf16": aten_int4_bf16,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
    "ark": ark,
}
OURS = "zoact"
BARE = ("dense product", "aten int4 product")
EXTRA = (*(f"zoact {name}" for name in FORCED), *BARE)  # timed where asked for
UNFUSED = ("torch unfused", "torch compiled")
EXACT_PEERS = ("openvino", "onnxruntime", "ark")


def gate(case: Case, data: Data, call: Call) -> float:
    """Largest error of a provider against float64, relative to the largest output; its noise replaced by ours."""
    if data.seeds is not None:
        data.noise = [
            rng.noise("normal", int(seed), PARAM_ID, case.N, case.rank).to(case.device) for seed in data.seeds
        ]
    w = data.ring[0].dequantize(torch.float64)
    rows = torch.arange(0, case.M, max(1, case.M // 64), device=case.device)
    x = data.x[rows].double()
    want = x @ w.T
    if data.basis is not None and data.coeff is not None and data.sigmas is not None and data.noise is not None:
        h = x @ data.basis.double()
        want += h @ data.coeff.double().T
        group = rows // (case.M // case.groups)
        for s, z in enumerate(data.noise):
            want += data.sigmas[group, s].double()[:, None] * (h @ z.double().T)
    got = call(0)[rows].double()
    data.noise = None
    return float((got - want).abs().max() / want.abs().max())
