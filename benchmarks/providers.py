"""Who is timed at zo_linear: our op, PyTorch as a competent user would write it, and the peers + ZO side path in torch.

A provider is a function (case, data) -> call(i) -> y [M, N], where i picks a weight of the ring; it raises Unsupported
with the reason where it can't serve a case. Peers are installed only for benchmarking (`make bench-peers`), serve the
CPU, and keep scales in fp32 where they can, so all read the same weight. The other ops: updates.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoact_kernels import ops, rng
from zoact_kernels.formats import FORMATS, PackedWeight

from .cases import Case

PARAM_ID = 1234
SIGMA = 1e-3
Call = Callable[[int], Any]


class Unsupported(Exception):
    """This provider can't serve this case; the message says why."""


@dataclass
class Data:
    """Tensors of a case. `ring` holds the weights in layout row; `seeds` one seed a pair of groups."""

    x: Tensor  # fp32 [M, K], of mean 3 like activations after a gate
    ring: list[PackedWeight]
    basis: Tensor | None  # [K, R]
    coeff: Tensor | None  # [N, R]
    seeds: Tensor | None  # int64 [S]
    sigmas: Tensor | None  # fp32 [G, S]
    noise: list[Tensor] | None = None  # set for the correctness gate: the very Z of our seeds instead of torch.randn


def make_data(case: Case, ring_bytes: float = 3e8) -> Data:
    """Random operands; codes are drawn, not quantised, since only their time matters."""
    generator = torch.Generator().manual_seed(0)
    count = 1 if case.residency == "cache" else int(ring_bytes / case.packed_bytes) + 1
    ring = [_weight(case, generator).to(case.device) for _ in range(count)]
    x = (torch.randn(case.M, case.K, generator=generator) + 3).to(case.device)
    if not case.rank:
        return Data(x, ring, None, None, None, None)
    pairs = max(1, case.groups // 2)
    sigmas = torch.zeros(case.groups, pairs)
    for g in range(case.groups):
        sigmas[g, g // 2] = -SIGMA if g % 2 else SIGMA
    return Data(
        x,
        ring,
        torch.linalg.qr(torch.randn(case.K, case.rank, generator=generator))[0].contiguous().to(case.device),
        (torch.randn(case.N, case.rank, generator=generator) * 1e-2).to(case.device),
        (torch.arange(pairs) + 7).to(case.device),
        sigmas.to(case.device),
    )


def _weight(case: Case, generator: torch.Generator) -> PackedWeight:
    N, K, size = case.N, case.K, case.group_size
    if case.format == "dense":
        return PackedWeight("dense", "row", -1, N, K, torch.randn(N, K, generator=generator) / K**0.5)
    groups = -(-K // size)
    scale = (torch.rand(N, groups, generator=generator) + 0.5) / K**0.5
    if case.format == "int8":
        codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
        return PackedWeight("int8", "row", size, N, K, codes, scale / 64)
    codes = torch.randint(0, 256, (N, -(-K // 2)), generator=generator, dtype=torch.uint8)
    return PackedWeight(case.format, "row", size, N, K, codes, scale / (4 if case.format == "int4" else 1))


Provider = Callable[[Case, Data], Call]

# Our op ---------------------------------------------------------------------------------------------------------------


def zoact(case: Case, data: Data) -> Call:
    layout = "cpu" if case.device == "cpu" else "row"
    ring = [w.to_layout(layout) for w in data.ring]
    param_id = torch.tensor([PARAM_ID], device=case.device)

    def call(i: int) -> Tensor:
        w = ring[i]
        return ops.zo_linear(
            data.x, w.weight, w.scale, w.offset, None, None, None, None, data.basis, data.coeff, None, None, data.seeds,
            data.sigmas, param_id if data.seeds is not None else None, case.format, layout, w.group_size, case.N,
            "normal", case.groups,
        )  # fmt: skip

    return call


# PyTorch --------------------------------------------------------------------------------------------------------------


def side_path(case: Case, data: Data) -> Callable[[Tensor], Tensor]:
    """y += (x A) C^T for all rows, then sigma (x_g A) Z^T per group: one torch.randn a seed, two skinny products."""
    if data.basis is None:
        return lambda y: y
    basis, coeff, sigmas = data.basis, data.coeff, data.sigmas.tolist()
    size = case.M // case.groups

    def add(y: Tensor) -> Tensor:
        h = data.x @ basis
        y = y.addmm_(h, coeff.T)
        for s in range(len(sigmas[0])):
            z = data.noise[s] if data.noise else torch.randn(case.N, case.rank, device=case.device)
            for g in (2 * s, 2 * s + 1):
                if g < case.groups:
                    y[g * size : (g + 1) * size].addmm_(h[g * size : (g + 1) * size], z.T, alpha=sigmas[g][s])
        return y

    return add


def _dequantise(case: Case, w: PackedWeight) -> Tensor:
    """One vectorised dequantisation to fp32 [N, K]."""
    N, K, size = case.N, case.K, case.group_size
    if case.format == "dense":
        return w.weight
    if case.format == "int8":
        codes = w.weight.float()
    else:
        pairs = torch.stack((w.weight & 15, w.weight >> 4), dim=-1).view(N, -1)[:, :K]
        codes = _table(case.format, case.device)[pairs.int()] if case.format != "int4" else pairs.float() - 8
    if K % size:
        return codes * w.scale.repeat_interleave(size, dim=1)[:, :K]
    return (codes.view(N, -1, size) * w.scale.unsqueeze(-1)).view(N, K)


@functools.cache
def _table(format: str, device: str) -> Tensor:
    return torch.tensor(FORMATS[format].table, device=device)


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
    """Resident fp32 weights, no dequantisation, the side path: what a user without memory limits has."""
    if case.format == "dense":
        raise Unsupported("torch unfused is that here")
    if case.residency == "rotating" and case.N * case.K * 4 * len(data.ring) > 4e9:
        raise Unsupported("the ring in fp32 is larger than 4 GB")
    ring = [w.dequantize(torch.float32) for w in data.ring]
    add = side_path(case, data)
    return lambda i: add(torch.nn.functional.linear(data.x, ring[i]))


# Peers ----------------------------------------------------------------------------------------------------------------


def _needs(library: str) -> Any:
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise Unsupported(f"{library} is not installed") from error


def _whole_groups(case: Case, *formats: str) -> None:
    if case.device != "cpu":
        raise Unsupported("called on the CPU only")
    if case.format not in formats:
        raise Unsupported(f"{case.format} is not among {', '.join(formats)}")
    if case.K % case.group_size:
        raise Unsupported(f"K={case.K} is no multiple of {case.group_size}")


def bitsandbytes_ring(case: Case, data: Data) -> list[tuple[Tensor, Any]]:
    """The ring as bitsandbytes stores it: (codes, its nibbles high first; quantisation state)."""
    _whole_groups(case, "nf4")
    functional = _needs("bitsandbytes.functional")
    ring = []
    for w in data.ring:
        state = functional.quantize_4bit(torch.zeros(case.N, case.K), blocksize=case.group_size, quant_type="nf4")[1]
        state.absmax.copy_(w.scale.reshape(-1))
        ring.append(((w.weight >> 4 | w.weight << 4).reshape(-1, 1), state))
    return ring


def bitsandbytes_nf4(case: Case, data: Data) -> Call:
    ring, bnb = bitsandbytes_ring(case, data), _needs("bitsandbytes")
    add = side_path(case, data)
    return lambda i: add(bnb.matmul_4bit(data.x, ring[i][0].t(), quant_state=ring[i][1]))


def aten_int4_bf16(case: Case, data: Data) -> Call:
    """bf16 activations and outputs: another class of precision, shown beside, never counted as a peer."""
    _whole_groups(case, "int4")
    if case.N % 16 or case.group_size not in (32, 64, 128, 256):
        raise Unsupported("N has to be a multiple of 16 and group_size 32, 64, 128 or 256")
    ring = []
    for w in data.ring:
        codes = w.codes().int()
        scales = torch.stack([w.scale.t(), torch.zeros_like(w.scale).t()], -1).contiguous().bfloat16()
        ring.append((torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scales))
    x, add = data.x.bfloat16(), side_path(case, data)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda i: add(product(x, ring[i][0], case.group_size, ring[i][1]).float())


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
    "torch unfused": torch_unfused,
    "torch compiled": torch_compiled,
    "torch dense": torch_dense,
    "bitsandbytes": bitsandbytes_nf4,
    "aten int4 bf16": aten_int4_bf16,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
    "ark": ark,
}
OURS = "zoact"
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
