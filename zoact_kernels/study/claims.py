"""What was published of a pair of methods, and whether the study sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .plan import Set
from .statistics import Interval


class Claim(NamedTuple):
    """better is said to beat worse; said: where, with which numbers (other models, tasks and budgets than here)."""

    better: str
    worse: str
    said: str


CLAIMS = (
    Claim("zo-act", "mezo", "arXiv 2607.01125, abstract: less variance, better than the baselines"),
    Claim("zo-act", "lozo", "the same"),
    Claim("zo-act", "subzero", "the same"),
    Claim("zo-act", "zo-act r64", "rank 1 often best: RTE 87.0 at rank 1, 83.0 at 32 (second hand)"),
    Claim("agzo", "mezo", "arXiv 2601.17261: Qwen3-0.6B SST-2 .877 against .858, fp32 (second hand)"),
    Claim("agzo", "lozo", "the same: .877 against .870"),
    Claim("mezo", "agzo", "AIM-ZO's rerun in bf16, OPT-13B, 40 000 forwards: 67.0 against 64.1"),
    Claim("mezo", "lozo", "the same: 67.0 against 52.4"),
    Claim("lozo", "mezo", "arXiv 2410.07698: OPT-13B RTE 70.4, above MeZO's"),
    Claim("subzero", "mezo", "arXiv 2410.08989: OPT-13B, mean of 11 tasks 71.7 against 70.5"),
    Claim("fzoo", "mezo", "arXiv 2506.09034: Llama-3-8B, 11 tasks, 77.2 against 75.4"),
    Claim("sparse-mezo", "mezo", "arXiv 2402.15751: LLaMA-7B 80.3 against 76.6"),
    Claim("zo-finetuner", "mezo", "arXiv 2510.00419: better loss in 23 of 28 pairs"),
    Claim("mezo-gv", "mezo", "arXiv 2601.04710: best of all on 11 of 11 tasks, OPT-13B"),
    Claim("mezo-greedy", "mezo", "the same paper"),
    Claim("mezo-bcd", "mezo", "arXiv 2501.19099: equal iterations, up to 2.77 times faster"),
    Claim("hi-zfo", "mezo", "arXiv 2601.05501, abstract"),
    Claim("forward-gradient", "mezo", "arXiv 2402.11592: no finite difference in it"),
    Claim("zo-adam", "mezo", "arXiv 2402.11592: ZO-Adam the steadier one"),
)


def verdict(found: Interval | None) -> str:
    if found is None:
        return "not measured yet"
    if math.isnan(found.half):
        return f"one run so far: {100 * found.mean:+.1f}"
    told = f"{100 * found.mean:+.1f} ± {100 * found.half:.1f}"
    if found.low > 0:
        return f"reproduced: {told}"
    return f"the opposite: {told}" if found.high < 0 else f"not reproduced, no difference is seen: {told}"


def section(scenes: Mapping[Set, Mapping[str, Any]], difference: Callable[[Any, Any], Interval | None]) -> list[str]:
    """A line a claim and scene: sets of one model and task are one scene, since their runs are alike."""
    merged: dict[tuple[str, str, int], dict[str, Any]] = {}
    for given, finals in scenes.items():
        merged.setdefault((given.model, given.task, given.final), {}).update(finals)
    lines = [
        "## Claims",
        "",
        "Differences of held-out accuracy in points, at equal forwards. What was published is about other models, "
        "tasks and budgets: a miss here says that the claim does not carry over to this setting, no more.",
        "",
        "| claim | published | here |",
        "|---|---|---|",
    ]
    for claim in CLAIMS:
        seen = []
        for (model, task, _), finals in merged.items():
            pair = [finals.get(name) for name in (claim.better, claim.worse)]
            found = None if None in pair else difference(*pair)
            seen += [f"{task} on {model}: {verdict(found)}"] if found is not None else []
        told = "; ".join(seen) or verdict(None)
        lines.append(f"| {claim.better} over {claim.worse} | {claim.said} | {told} |")
    return [*lines, ""]
