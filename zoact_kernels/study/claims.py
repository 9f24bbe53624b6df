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


REPEATED = "| | |"  # claim and what was said, in the lines of further scenes


def verdict(gain: Interval) -> str:
    """gain: of the one said to be better."""
    if math.isnan(gain.half):
        return "one run so far"
    return "reproduced" if gain.low > 0 else "the opposite" if gain.high < 0 else "not reproduced"


def of_loss(found: Interval) -> str:
    return f"{found.mean:+.3f}" + ("" if math.isnan(found.half) else f" ± {found.half:.3f}")


def section(
    scenes: Mapping[Set, Mapping[str, Any]],
    difference: Callable[[Any, Any], Interval | None],
    loss_difference: Callable[[Any, Any], Interval | None],
) -> list[str]:
    """A line a claim and scene: sets of one model and task are one scene, since their runs are alike."""
    merged: dict[tuple[str, str, int], dict[str, Any]] = {}
    for given, finals in scenes.items():
        merged.setdefault((given.model, given.task, given.final), {}).update(finals)
    lines = [
        "## Claims",
        "",
        "Differences of held-out accuracy in points and of the held-out loss (over seeds alone), at equal forwards. "
        "Not reproduced: the interval holds 0; one line in twenty leaves it out by chance. What was published is "
        "about other models, tasks and budgets: a miss here says that it does not carry over to this setting, no more.",
        "",
        "| claim | published | here | accuracy | verdict | loss | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        told = f"| {claim.better} over {claim.worse} | {claim.said} |"
        for (model, task, _), finals in merged.items():
            pair = [finals.get(name) for name in (claim.better, claim.worse)]
            gain, loss = (None, None) if None in pair else (difference(*pair), loss_difference(*pair))
            if gain is None or loss is None:
                continue
            points = f"{100 * gain.mean:+.1f}" + ("" if math.isnan(gain.half) else f" ± {100 * gain.half:.1f}")
            fall = Interval(-loss.mean, loss.half, loss.seeds)
            lines.append(f"{told} {task} on {model} | {points} | {verdict(gain)} | {of_loss(loss)} | {verdict(fall)} |")
            told = REPEATED
        if told != REPEATED:
            lines.append(f"{told} not measured yet | – | – | – | – |")
    return [*lines, ""]
