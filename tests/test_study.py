"""The study on a tiny random model: a queue that survives, statistics by hand, a report made of rows alone."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import LABELS, PROMPT, make_model_dir, write_examples

from zoact_kernels import demo
from zoact_kernels.data import Task, read
from zoact_kernels.integrations.transformers import load_model
from zoact_kernels.learning import Course
from zoact_kernels.methods import METHODS, arguments
from zoact_kernels.methods.learned import ZOFinetuner
from zoact_kernels.recipe import Recipe
from zoact_kernels.study import claims, first_order, nets, plan, report, rows, settings, work
from zoact_kernels.study.plan import Row, Run, Set
from zoact_kernels.study.queue import ATTEMPTS, Claim, Queue, acquire
from zoact_kernels.study.statistics import Interval, interval, seed_interval, t_quantile
from zoact_kernels.swap import ZOConfig

TINY = Set("tiny", "tiny", "colours", ("zo-act", "lozo", "qzo", "adam on C", "lora by adam"), 200, 320, 10.0, 1)


def install(folder: Path) -> None:
    """The tiny model and its task among those of the study; TINY as its only set."""
    if not (folder / "model").exists():
        make_model_dir(folder / "model")
        for name, count, start in (("train", 64, 0), ("validation", 12, 64), ("held_out", 20, 80)):
            write_examples(folder / f"{name}.csv", count, start)

    def load(task: Task, dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
        loaded = load_model(folder / "model", ZOConfig(format="dense", rank=0, layout="row"), dtype=dtype)
        return loaded.model, loaded.tokenizer

    def examples(where: Path) -> demo.Demo:
        task = Task("colours", PROMPT, LABELS)
        return demo.Demo(task, *(read(folder / f"{part}.csv", task) for part in ("train", "validation", "held_out")))

    settings.LOADERS["tiny"] = load
    demo.DEMOS["colours"] = examples
    demo._folder = lambda: folder
    for room in (plan, work, report):
        room.sets = lambda: (TINY,)
    plan.MEASURES = ()


def patched(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """`install` for the time of a test, with two rates and two seeds."""
    torch.set_num_threads(1)
    for room, name in ((plan, "sets"), (work, "sets"), (report, "sets"), (plan, "MEASURES"), (demo, "_folder")):
        patch.setattr(room, name, getattr(room, name))
    patch.setitem(settings.LOADERS, "tiny", None)
    patch.setitem(demo.DEMOS, "colours", None)
    patch.setattr(plan, "EXTENSIONS", 0)
    patch.setattr(plan, "SEEDS", (0, 1))
    patch.setattr(plan, "GRID", plan.GRID[1:3])
    install(folder)


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "study"
    patched(monkeypatch, folder)
    return folder


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (30, 2.04227), (1000, 1.96234)]
)
def test_t_quantile(freedom: int, quantile: float) -> None:
    """The printed tables, 97.5 %."""
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, rel=3e-6)


def test_t_quantile_of_a_fraction_lies_between() -> None:
    assert t_quantile(0.975, 3) < t_quantile(0.975, 2.5) < t_quantile(0.975, 2)
    assert t_quantile(0.95, 4) == pytest.approx(2.131847, rel=3e-6)
    with pytest.raises(ValueError, match="freedom"):
        t_quantile(0.975, 0.5)


def test_seed_interval() -> None:
    """Three seeds: mean 2, s = 1, t(2) s / sqrt(3)."""
    found = seed_interval(np.array([1.0, 2.0, 3.0]))
    assert found.mean == 2 and found.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert math.isnan(seed_interval(np.array([1.0])).half)


def test_interval_over_seeds_and_examples() -> None:
    """2 seeds x 4 examples by hand."""
    table = np.array([[1, 1, 0, 1], [1, 0, 0, 0]])
    v_s = ((0.75 - 0.5) ** 2 + (0.25 - 0.5) ** 2) / 1 / 2  # means 0.75, 0.25
    v_e = (0.25 + 0 + 0.25 + 0) / 3 / 4  # means 1, 1/2, 0, 1/2
    freedom = (v_s + v_e) ** 2 / (v_s**2 / 1 + v_e**2 / 3)
    found = interval(table)
    assert found.mean == 0.5 and found.seeds == 2
    assert found.half == pytest.approx(t_quantile(0.975, freedom) * math.sqrt(v_s + v_e), rel=1e-12)
    assert interval(np.ones((3, 5))).half == 0
    assert math.isnan(interval(np.ones((1, 5))).half)


def test_a_paired_difference_is_narrower() -> None:
    """The same examples are easy for both; what differs is one example of ten."""
    a = np.tile(np.array([1, 0] * 5), (3, 1)).astype(float)
    b = a.copy()
    b[:, 0] = 0
    paired, single = interval(a - b), interval(a)
    assert paired.mean == pytest.approx(0.1) and paired.half < single.half
    assert paired.half == pytest.approx(t_quantile(0.975, 9) * 0.1, rel=1e-9)  # examples alone: sd 0.316 / sqrt(10)


def test_claims_are_told_scene_by_scene() -> None:
    gains = {("mezo", "agzo"): Interval(0.083, 0.038, 3), ("agzo", "mezo"): Interval(-0.083, 0.038, 3)}
    falls = {("mezo", "agzo"): Interval(-0.01, 0.1, 3), ("agzo", "mezo"): Interval(0.2, math.nan, 1)}
    scenes = {
        TINY: {"mezo": "mezo", "agzo": "agzo"},
        TINY._replace(name="more", contenders=()): {"fzoo": "fzoo"},  # of the same model and task: one scene
        TINY._replace(name="other", task="shapes"): {"mezo": "mezo", "agzo": "agzo"},
    }
    told = claims.section(scenes, lambda a, b: gains.get((a, b)), lambda a, b: falls.get((a, b)))
    text = "\n".join(told)
    assert "| colours on tiny | +8.3 ± 3.8 | reproduced | -0.010 ± 0.100 | not reproduced |" in text
    assert "| colours on tiny | -8.3 ± 3.8 | the opposite | +0.200 | one run so far |" in text
    assert text.count("| | | shapes on tiny |") == 2
    assert text.count("not measured yet") == len(claims.CLAIMS) - 2
    assert len({line.count("|") for line in told if line.startswith("|")}) == 1


# --- queue ------------------------------------------------------------------------------------------------------------

RUNS = [(2, Run("s", "cost", "b")), (1, Run("s", "cost", "a")), (3, Run("s", "sweep", "a", 1e-3, 100, 50))]


def test_the_queue_hands_out_in_order_and_keeps_what_it_is_told(tmp_path: Path) -> None:
    with Queue(tmp_path) as queue:
        assert queue.add(RUNS) == 3 and queue.add(RUNS) == 0
        first = queue.claim()
        assert first is not None and first.run == RUNS[1][1] and first.attempts == 1
        queue.finish(first, {"x": 1})
        first.close()
        second = queue.claim()
        assert second is not None and second.run == RUNS[0][1]
        queue.fail(second, "no such thing")
        second.close()
        assert queue.claim(["other"]) is None
        third = queue.claim(["s/sweep"])
        assert third is not None
        queue.give_back(third)
        third.close()
    with Queue(tmp_path) as queue:
        known = queue.rows()
        assert [row.state for row in known.values()] == ["done", "failed", "waiting"]
        done, failed, _ = known.values()
        assert done.result == {"x": 1} and failed.reason == "no such thing"
        assert queue.retry() == 1 and queue.rows()["s/cost/b/s0/0"].state == "waiting"
        again = queue.claim(["s/sweep"])
        assert again is not None and again.attempts == 1  # what was given back was no attempt
        again.close()


def test_rows_of_another_machine_outlive_an_older_queue(tmp_path: Path) -> None:
    """A queue that waits for a run, or failed at it, neither drops the row that another finished nor does it again."""
    (_, b), (_, a), (_, sweep) = RUNS
    theirs = {run.id: Row(run, "done", {"x": 2}) for run in (a, b)} | {sweep.id: Row(sweep, "failed", {}, "theirs")}
    rows.write(tmp_path, theirs)
    with Queue(tmp_path / "queue") as queue:
        queue.add(RUNS)
        rows.write(tmp_path, queue.rows())
        assert {row.run.id: row for row in rows.read(tmp_path)} == theirs
        claim = queue.claim()
        assert claim is not None and claim.run == a
        queue.fail(claim, "ours")
        claim.close()
        queue.adopt(rows.read(tmp_path))
        known = queue.rows()
        assert (known[a.id], known[b.id]) == (theirs[a.id], theirs[b.id])
        assert known[sweep.id].state == "waiting"  # what failed elsewhere may be tried here
        claim = queue.claim()
        assert claim is not None and claim.run == sweep
        queue.finish(claim, {"x": 3})
        claim.close()
        queue.adopt(rows.read(tmp_path))
        rows.write(tmp_path, queue.rows())
    assert {row.run.id: row.result for row in rows.read(tmp_path)}[sweep.id] == {"x": 3}


def test_two_workers_never_get_the_same_run(tmp_path: Path) -> None:
    with Queue(tmp_path) as one, Queue(tmp_path) as other:
        one.add(RUNS)
        claims = [one.claim(), other.claim(), one.claim()]
        assert len({claim.run.id for claim in claims if claim}) == 3
        assert other.claim() is None and one.claim() is None
        assert one.others_at_work() and not one.others_at_work(["elsewhere"])
        for claim in claims:
            assert claim is not None
            claim.close()
        assert not one.others_at_work()


def test_a_run_whose_worker_is_gone_is_taken_up_and_given_up_in_the_end(tmp_path: Path) -> None:
    with Queue(tmp_path) as queue:
        queue.add(RUNS[:1])
        for attempt in range(1, ATTEMPTS + 1):
            claim = queue.claim()
            assert claim is not None and claim.attempts == attempt
            claim.close()  # as the system does for a process that ends: nothing was said to the queue
        assert queue.claim() is None
        (row,) = queue.rows().values()
        assert row.state == "failed" and f"{ATTEMPTS} times" in row.reason


def test_plan_is_idempotent_and_grows_with_what_is_known(tiny: Path, tmp_path: Path) -> None:
    with Queue(tmp_path) as queue:
        assert queue.add(plan.due(queue.rows())) == len(TINY.contenders) + 1
        assert queue.add(plan.due(queue.rows())) == 0
        cost = Run("tiny", "cost", "zo-act")
        known = {cost.id: Row(cost, "done", {})}
        sweep = [run for _, run in plan.due(known) if run.stage == "sweep"]
        assert [run.lr for run in sweep] == [3.16e-4, 1e-3]


def sweep_of(losses: dict[float, float | None], forwards: int = TINY.sweep) -> dict[str, Row]:
    cost = Run("tiny", "cost", "zo-act")
    known = {cost.id: Row(cost, "done", {})}
    for lr, loss in losses.items():
        run = Run("tiny", "sweep", "zo-act", lr, plan.SWEEP_SEED, forwards)
        known[run.id] = Row(run, "done" if loss is not None else "failed", {"curve": [[0, 0, 0, loss, 0]]})
    return known


def test_the_grid_grows_while_the_best_is_an_end() -> None:
    who = plan.contender("zo-act")
    inside = sweep_of({1e-4: 3.0, 3.16e-4: 1.0, 1e-3: 2.0, 3.16e-3: None})
    assert plan.chosen(TINY, who, inside)[:2] == (3.16e-4, False)
    end = sweep_of({1e-4: 3.0, 3.16e-4: 2.5, 1e-3: 2.0, 3.16e-3: 1.0})
    assert plan.chosen(TINY, who, end)[:2] == (None, False)
    assert [run.lr for run in plan.grid(TINY, who, end)][-1] == 1e-2
    longer = end | sweep_of({1e-2: 0.9, 3.16e-2: 0.8, 1e-1: 0.7, 3.16e-1: 0.6})
    assert plan.chosen(TINY, who, longer)[:2] == (0.316, True)  # EXTENSIONS of them, then it says so
    longer |= sweep_of({0.316: 0.6}, TINY.final)
    finals = [run for _, run in plan.due(longer, [TINY]) if run.stage == "final" and run.contender == "zo-act"]
    assert [run.seed for run in finals] == list(plan.SEEDS) and {run.lr for run in finals} == {0.316}
    hopeless = sweep_of({1e-4: None, 3.16e-4: None, 1e-3: None, 3.16e-3: None})
    assert plan.chosen(TINY, who, hopeless)[:2] == (None, False)
    assert not [run for _, run in plan.due(hopeless, [TINY]) if run.stage == "final" and run.contender == "zo-act"]


def test_an_lr_has_to_last() -> None:
    """The grid's best runs as long as a final run, then the next lower lr, until one ends below its short run."""
    who, short = plan.contender("zo-act"), {1e-4: 3.0, 3.16e-4: 2.0, 1e-3: 1.0, 3.16e-3: None}

    def asked(known: dict[str, Row]) -> list[tuple[str, float | None, int]]:
        wanted = [run for _, run in plan.due(known, [TINY]) if run.contender == "zo-act" and run.id not in known]
        return [(run.stage, run.lr, run.forwards) for run in wanted]

    longer: dict[float, float | None] = {}
    for lr, loss, then in ((1e-3, 1.1, 3.16e-4), (3.16e-4, None, 1e-4)):  # worse than before; not finite
        known = sweep_of(short) | sweep_of(longer, TINY.final)
        assert asked(known) == [("sweep", lr, TINY.final)] and plan.chosen(TINY, who, known)[:2] == (lr, False)
        longer[lr] = loss
        assert plan.chosen(TINY, who, known | sweep_of(longer, TINY.final))[:2] == (then, False)
    for loss in (2.9, 3.1):  # there is no lower one
        known = sweep_of(short) | sweep_of(longer | {1e-4: loss}, TINY.final)
        assert asked(known) == [("final", 1e-4, TINY.final)] * len(plan.SEEDS)
    even = TINY._replace(final=TINY.sweep)
    assert plan.chosen(even, who, sweep_of(short))[:2] == (1e-3, False)
    assert {run.stage for _, run in plan.due(sweep_of(short), [even]) if run.contender == "zo-act"} >= {"final"}


def test_a_set_may_take_the_lr_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    other = TINY._replace(name="other", contenders=("zo-act", "mezo"), rates=("tiny",))
    monkeypatch.setattr(plan, "sets", lambda: (TINY, other))
    cost = Run("other", "cost", "zo-act")
    known = sweep_of({1e-4: 3.0, 3.16e-4: 1.0, 1e-3: 2.0, 3.16e-3: None}) | {cost.id: Row(cost, "done", {})}
    assert [run.stage for _, run in plan.due(known, [other]) if run.contender == "zo-act"] == ["cost"]
    known |= sweep_of({3.16e-4: 0.9}, TINY.final)
    runs = [run for _, run in plan.due(known, [other]) if run.contender == "zo-act"]
    assert [(run.stage, run.lr) for run in runs] == [("cost", None)] + [("final", 3.16e-4)] * len(plan.SEEDS)
    undecided = {cost.id: Row(cost, "done", {})}
    assert [run.stage for _, run in plan.due(undecided, [other]) if run.contender == "zo-act"] == ["cost"]
    assert "mezo" not in TINY.contenders  # whom that set does not have, sweeps here
    cost = Run("other", "cost", "mezo")
    runs = [run for _, run in plan.due({cost.id: Row(cost, "done", {})}, [other]) if run.contender == "mezo"]
    assert [run.stage for run in runs] == ["cost"] + ["sweep"] * len(plan.GRID) and runs[1].set == "other"


def test_rates_are_of_sets_of_the_same_weights_and_forwards() -> None:
    by_name = {given.name: given for given in plan.sets()}
    for given in by_name.values():
        for base in (by_name[name] for name in given.rates):
            assert "encoder" not in (base.model, given.model)  # the INT4 model and its dense twin are one in numbers
            assert (base.task, base.scale, base.sweep) == ("trec", given.scale, given.sweep)
        for name in given.contenders:
            own = plan.sweeping(given, name)
            assert plan.sweeping(own, name) == own  # or nobody would ever sweep


@pytest.mark.parametrize("name", [n for n in METHODS if "targets" in arguments(n)])
def test_adapters_go_where_the_model_has_projections(name: str) -> None:
    who = plan.contender(name)
    assert work.recipe_of(who, lr=1.0, steps=1, seed=0, model="dense").options == {}
    assert work.recipe_of(who, lr=1.0, steps=1, seed=0, model="encoder").options == {"targets": "query,value"}


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(queue, rows) of the whole tiny study."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patched(patch, tmp_path_factory.getbasetemp() / "study")
        with Queue(folder / "queue") as queue:
            work.work(queue)
            rows.write(folder / "rows", queue.rows())
    return folder / "queue", folder / "rows"


def test_first_order_clips_and_its_lr_falls_to_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_order, "CLIP", 1e-3)
    setting, recipe = settings.load("tiny", "colours"), Recipe(steps=4, batch_size=8, lr=1e-2)
    bound = first_order.begin("adam-on-c", setting, 1, recipe)
    rates, norms = [], []
    for step in range(recipe.steps):
        rates.append(bound.adam.param_groups[0]["lr"])
        bound.step(setting.training.batch_at(recipe, step))
        norms.append(float(torch.stack([p.grad.norm() for p in bound.parameters if p.grad is not None]).norm()))
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3]) and bound.adam.param_groups[0]["lr"] == 0
    assert norms == pytest.approx([1e-3] * recipe.steps, rel=1e-3)  # what is clipped has this norm, more or less 1e-6


def test_zo_finetuner_has_nets_of_another_task(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TASK", "OTHER"):
        monkeypatch.setattr(nets, name, "colours")
    monkeypatch.setattr(nets, "COURSE", Course(epochs=1, restart_every=1, limit=4, reach=10.0))
    run = Run("tiny", "final", "zo-finetuner", 1e-4, 0, 320)
    directory = tmp_path / "queue" / "runs" / "one"
    claim = Claim(run, directory, 1, acquire(tmp_path))
    costs = {"setup_forwards": 0.0, "forwards_per_step": 32.0}
    known = {Run("tiny", "cost", "zo-finetuner").id: Row(Run("tiny", "cost", "zo-finetuner"), "done", costs)}
    seen: list[Recipe] = []

    def trained(setting: Any, who: Any, recipe: Recipe, *others: Any) -> Any:
        seen.append(recipe)
        return setting.model, {"curve": []}

    monkeypatch.setattr(work, "_train", trained)
    for _ in range(2):
        work.perform(claim, TINY, known, math.inf)
    assert seen[0] == seen[1] and seen[0].steps == 10
    path = Path(seen[0].options["nets"])
    assert path.parent == tmp_path / "queue" / "nets"
    written = path.stat().st_mtime_ns
    assert nets.nets_for("tiny", "colours", path.parent) == path and path.stat().st_mtime_ns == written  # once
    optimizer = ZOFinetuner(settings.load("tiny", "colours").model, nets=str(path))
    optimizer.refresh()
    assert float((optimizer.s - 1).abs().max()) > 1e-6


def test_a_whole_study(finished: tuple[Path, Path]) -> None:
    """qzo can't train a dense model, and says so; all else has a sweep, two seeds and a test."""
    with Queue(finished[0]) as queue:
        known = queue.rows()
    failed = {key: row.reason for key, row in known.items() if row.state == "failed"}
    assert list(failed) == ["tiny/cost/qzo/s0/0"] and "no scales" in failed["tiny/cost/qzo/s0/0"]
    assert not [row for row in known.values() if row.state in ("waiting", "running")]
    for name in ("zo-act", "lozo", "adam on C", "lora by adam"):
        assert len([row for row in known.values() if (row.run.stage, row.run.contender) == ("final", name)]) == 2
    costs = {row.run.contender: row.result for row in known.values() if row.run.stage == "cost" and row.result}
    assert costs["zo-act"]["forwards_per_step"] == 32 and costs["lozo"]["setup_forwards"] == 0
    assert costs["zo-act"]["setup_forwards"] == 16 * (
        1 + 2 * 8
    )  # who shares an input; two batches, seven passes, energy
    assert costs["adam on C"]["forwards_per_step"] == costs["lora by adam"]["forwards_per_step"] == 48
    for row in known.values():
        if row.run.stage == "final" and row.run.contender == "lozo":
            steps = row.result["steps"]
            assert steps == TINY.final // 32 and row.result["curve"][-1][:2] == [steps, 32 * steps]
            assert work.hits(row.result["test"]).mean() == pytest.approx(row.result["test"]["accuracy"])
    assert not list((finished[0] / "runs").iterdir())


def test_the_report_is_made_of_the_rows_alone(finished: tuple[Path, Path], tiny: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        for file in rows.FILES:
            (folder / file).write_bytes((finished[1] / file).read_bytes())
        report.write(folder)
        rows.write(folder, {})  # nothing is lost by writing them again
        texts.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert texts[0] == texts[1] and set(texts[0]) == {*rows.FILES, "report.md", "curve-tiny.png"}
    told = texts[0]["report.md"].decode()
    assert "zo-act beats lozo:" in told and "failed: tiny/cost/qzo/s0/0" in told and "| untrained |" in told
    for line in texts[0]["runs.jsonl"].decode().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_report_names_those_that_came_apart() -> None:
    def ended(name: str, *losses: float) -> report.Final:
        return report.Final(name, plan.Choice(), None, [*losses], [], None, [])

    known = [ended(plan.BEFORE, 1.5), ended("zo-act", 1.4, 1.5), ended("lozo", 1.4, 1.7), ended("mezo", 1.0, math.nan)]
    (told,) = report._came_apart({final.name: final for final in known})
    assert "(1.50)" in told and told.endswith("lozo (1.55), mezo (nan).") and "zo-act" not in told
    assert report._came_apart({final.name: final for final in known[:2]}) == []


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_study
from zoact_kernels.study import work, plan
from zoact_kernels.study.queue import Queue
test_study.install(Path({folder!r}))
with Queue(Path({queue!r})) as queue:
    work.work(queue, only=["tiny/final/lozo"], said=lambda text: print(text, flush=True))
"""


def test_kill_dash_nine(finished: tuple[Path, Path], tiny: Path, tmp_path: Path) -> None:
    """A worker dies in the middle of a run; the next one goes on from its log and comes to the very same row."""
    long = Run("tiny", "final", "lozo", 1e-5, 7, 32 * 150)
    known = {row.run.id: row for row in rows.read(finished[1])}
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tiny), queue=str(tmp_path / "killed"))
    with Queue(tmp_path / "killed") as queue, Queue(tmp_path / "whole") as whole:
        for place in (queue, whole):
            place.adopt([row for row in known.values() if row.run.stage == "cost"])
            place.add([(-1, long)])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        worker = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        log = queue._place(long.id) / "log" / "metrics.csv"
        end = time.monotonic() + 60
        while time.monotonic() < end and not (log.exists() and log.read_text().count("\n") > 30):
            time.sleep(0.02)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        assert queue.rows()[long.id].state == "running" and not queue.others_at_work()
        for place in (queue, whole):
            assert work.work(place, only=[long.id]) == 1
        found, wanted = (place.rows()[long.id].result for place in (queue, whole))
        assert found["steps"] == 150 and found["test"] == wanted["test"]
        assert [point[3:] for point in found["curve"]] == [point[3:] for point in wanted["curve"]]


def test_time_that_is_up_pauses_a_run(finished: tuple[Path, Path], tiny: Path, tmp_path: Path) -> None:
    long = Run("tiny", "final", "lozo", 1e-5, 7, 32 * 40)
    with Queue(tmp_path) as queue:
        queue.adopt([row for row in rows.read(finished[1]) if row.run.stage == "cost"])
        queue.add([(-1, long)])
        claim = queue.claim([long.id])
        assert claim is not None
        with pytest.raises(work.Stopped):
            work.perform(claim, TINY, queue.rows(), time.monotonic())
        queue.give_back(claim)
        claim.close()
        assert queue.rows()[long.id].state == "waiting"
        assert work.work(queue, only=[long.id]) == 1
        assert queue.rows()[long.id].result["steps"] == 40
