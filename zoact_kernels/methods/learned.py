"""Dense noise whose size is learned: small nets say for each tensor how far it is moved.

    s_b = |NN_b(mean W_b, var W_b, L+, L-, previous s_b)|     Linear(5, 64), tanh, Linear(64, 1): one net a tensor
    c = sqrt(sum_b n_b) / sqrt(sum_b n_b s_b^2)               n_b = entries / 1e6, of a table those that a batch reads

`learning` trains the nets, once for a base model; a run of any task then takes them from that file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import rng
from ..layers import ZOLinear
from ..parameters import Perturbed
from ..perturbation import Perturbation
from ..trainables import Weight
from .dense import MeZO

INPUTS, HIDDEN = 5, 64
RUNS, RUN = 32, 512  # torch sums less than 2^15 entries, or rows, in an order that doesn't depend on threads


class PerturbNets:
    """A net for each of L tensors, all evaluated as one. names: of the tensors.

    tensors: "hidden" [L, 64, 5], "bias" [L, 64], "out" [L, 64], "shift" [L], fp32.
    They begin as the constant 1: random hidden layers, `out` zero, `shift` one.
    """

    def __init__(self, names: Sequence[str], device: torch.device, seed: int = 0) -> None:
        self.names, L = list(names), len(names)
        begin = [rng.noise("normal", seed, rng.param_id(f"{name}#net"), HIDDEN, INPUTS + 1) for name in names]
        first = torch.stack(begin).to(device) / INPUTS**0.5
        self.tensors = {
            "hidden": first[:, :, :INPUTS].contiguous(),
            "bias": first[:, :, INPUTS].contiguous(),
            "out": torch.zeros(L, HIDDEN, device=device),
            "shift": torch.ones(L, device=device),
        }

    def __call__(self, inputs: Tensor) -> Tensor:
        """[L, 5] -> [L], not negative."""
        t = self.tensors
        h = torch.tanh((t["hidden"] * inputs[:, None]).sum(2) + t["bias"])  # sums of few terms: no BLAS, no threads
        return ((t["out"] * h).sum(1) + t["shift"]).abs()

    def state(self) -> dict[str, Tensor]:
        """What a file holds: "<name of the tensor>/<key>", one net under each name."""
        return {
            f"{name}/{key}": tensor[i].detach().to("cpu", copy=True)
            for i, name in enumerate(self.names)
            for key, tensor in self.tensors.items()
        }

    @torch.no_grad()
    def take(self, state: Mapping[str, Tensor], what: str) -> None:
        """Take over a `state`. Raises ValueError naming `what`, nothing changed, for nets of another model."""
        wanted = self.state()
        told = "; nets are trained for one base model: zoact learn-perturbations"
        if missing := sorted({key.rpartition("/")[0] for key in wanted.keys() - state.keys()}):
            raise ValueError(f"{what} has no whole net for {_some(missing)}{told}")
        if surplus := sorted({key.rpartition("/")[0] for key in state.keys() - wanted.keys()}):
            raise ValueError(f"{what} has nets for {_some(surplus)}, which this method does not train here{told}")
        for key, mine in wanted.items():
            given = state[key]
            if given.shape != mine.shape or given.dtype != mine.dtype or not bool(given.isfinite().all()):
                raise ValueError(
                    f"{what}: {key!r} is {given.dtype} {tuple(given.shape)}; needed is finite float32 "
                    f"{tuple(mine.shape)}"
                )
        for key, tensor in self.tensors.items():
            tensor.copy_(torch.stack([state[f"{name}/{key}"] for name in self.names]))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_nets(path: Path) -> dict[str, Tensor]:
    """The entries of a file of nets. Raises FileNotFoundError, or ValueError where it is no whole safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`nets` is {str(path)!r}, which is no whole safetensors file: {error}") from error


class ZOFinetuner(MeZO):
    """theta_b +- sigma c s_b z_b;  d = (L+ - L-) / (2 sigma);  theta_b <- theta_b - lr d c s_b z_b.

    c keeps sum_b n_b (c s_b)^2 = sum_b n_b: nets move the radius between tensors and never change it as a whole. L+ and
    L- are the mean losses of the last step that was not skipped (0 before it), var that of a population.

    nets: file of trained nets ("": untrained, s = 1 everywhere, which is MeZO bit for bit). A run keeps its nets in its
        snapshots: resumed or replayed it needs the file no more.
    tokens: entries of a table that a batch reads, over its width: 15 for each of 16 examples, as the released code has.
    """

    name, paper = "zo-finetuner", "arXiv 2510.00419"
    summary = "all weights along dense noise, sized tensor by tensor by learned nets"

    def __init__(
        self,
        model: nn.Module,
        *,
        nets: str = "",
        tokens: int = 240,
        sides: str = "two-sided",
        lr: float = 1e-7,
        **others: Any,
    ) -> None:
        if sides != "two-sided":
            raise ValueError(f"sides is {sides!r}; {self.name} looks at the losses of both: two-sided only")
        if tokens < 1:
            raise ValueError(f"tokens is {tokens}; a batch reads at least 1 row of a table")
        self.tokens, self.missing = tokens, ""
        super().__init__(model, sides=sides, lr=lr, **others)
        self.rule.gains = self.scales[:, None]
        self.nets = PerturbNets(list(self.trainables), self.device, self.seed)
        if nets and Path(nets).is_file():
            self.nets.take(read_nets(Path(nets)), f"`nets` {nets!r}")
        elif nets:
            self.missing = f"`nets` is {nets!r}, and there is no such file; zoact learn-perturbations writes one"
        else:
            self.note = "no trained `nets` given: every tensor has the scale 1, as in MeZO"

    def find(self, model: nn.Module, handle: Perturbation) -> list[Weight]:
        return self.prepare_scales(super().find(model, handle))

    def prepare_scales(self, found: list[Weight]) -> list[Weight]:
        """Give what is perturbed its scales, all 1. Raises ValueError if there is nothing."""
        if not found:
            raise ValueError("`model` has no parameter to train")
        device = found[0].value.device
        read = [self._entries(weight) for weight in found]
        self.sizes = torch.tensor(read, dtype=torch.float64, device=device) / 1e6  # n_b [L]
        self.losses = torch.zeros(2, device=device)  # L+, L- of the previous step
        self.previous = torch.ones(len(found), device=device)  # s_b of the previous step
        self.s, self.scales = (torch.ones(len(found), device=device) for _ in range(2))  # s_b, c s_b of this step
        place(found, self.scales)
        return found

    @contextlib.contextmanager
    def sized(self, scales: Tensor) -> Iterator[None]:
        """Inside the block probes have `scales` [L], which may want a gradient, in place of this step's."""
        weights = [t for t in self.trainables.values() if isinstance(t, Weight)]
        place(weights, scales)
        try:
            yield
        finally:
            place(weights, self.scales)

    def _entries(self, weight: Weight) -> int:
        if any(isinstance(owner, nn.Embedding) for owner, _ in weight.sites):
            return min(weight.value.numel(), weight.value.shape[1] * self.tokens)
        return weight.value.numel()

    @torch.no_grad()
    def inputs(self) -> Tensor:
        """What the nets look at, [L, 5]; `seen` is that of the step at hand."""
        weights = moments([t.value for t in self.trainables.values()])
        return torch.cat([weights, self.losses.expand(len(weights), 2), self.previous[:, None]], dim=1)

    def normaliser(self, s: Tensor) -> Tensor:
        """c [] of the scales s [L]."""
        least = torch.finfo(torch.float32).tiny  # all nets may say 0
        return (self.sizes.sum() / (self.sizes * s.double().square()).sum().clamp(min=least)).sqrt()

    @torch.no_grad()
    def refresh(self) -> None:
        self.seen = self.inputs()
        self.s.copy_(self.nets(self.seen))
        self.scales.copy_(self.normaliser(self.s) * self.s)

    def observe(self, losses: Tensor) -> None:
        self.losses.copy_(torch.stack((losses[0::2].mean(), losses[1::2].mean())))
        self.previous.copy_(self.s)

    def own_state(self) -> dict[str, Tensor]:
        nets = {f"nets/{key}": tensor for key, tensor in self.nets.tensors.items()}
        return {"sizes": self.sizes, "losses": self.losses, "previous": self.previous, **nets}

    def state_dict(self) -> dict[str, Tensor]:
        if self.missing:
            raise ValueError(self.missing)
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.missing = self.note = ""

    def _check(self) -> None:
        if self.missing:
            raise ValueError(self.missing)
        super()._check()


def place(weights: Sequence[Weight], scales: Tensor) -> None:
    """From now on probes of `weights` multiply their sigmas by `scales` [L], which are read when a layer runs."""
    for i, weight in enumerate(weights):
        for owner, key in weight.sites:
            if isinstance(owner, Perturbed):
                owner.zo_scales[key] = scales[i : i + 1]
            elif isinstance(owner, ZOLinear):
                setattr(owner, "sigma_scale" if key == "weight" else "bias_sigma_scale", scales[i : i + 1])


def moments(values: Sequence[Tensor]) -> Tensor:
    """Mean and variance (of a population) of each tensor, fp32 [L, 2]; the same bits for any number of threads.

    Sums of RUN entries in fp32, what is left over and all further sums in fp64.
    """
    sums = []
    for value in values:
        flat = value.detach().reshape(-1)
        whole = flat.numel() // (RUNS * RUN) * RUNS * RUN
        rest = flat[whole:].double()
        both = [rest.sum(), torch.linalg.vector_norm(rest).square()]
        if whole:
            runs = flat[:whole].view(-1, RUNS, RUN)
            both[0] = both[0] + runs.sum(2, dtype=torch.float32).double().sum(1).sum()
            norms = torch.linalg.vector_norm(runs, dim=2, dtype=torch.float32)
            both[1] = both[1] + norms.double().square().sum(1).sum()
        sums += both
    counts = torch.tensor([[value.numel()] for value in values], dtype=torch.float64).to(sums[0].device)
    mean, square = (torch.stack(sums).view(-1, 2) / counts).unbind(1)
    return torch.stack((mean, (square - mean.square()).clamp(min=0)), dim=1).float()
