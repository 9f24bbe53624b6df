"""What a GPU does with our kernels, within minutes and unattended: `make bench-gpu`, or `python -m benchmarks.gpu`.

Needs torch and Triton and nothing else; a peer library that is missing costs its rows. The plan runs in order of
importance, so a run that is cut off has answered what matters most: roof, the ideal shape in bf16, a whole step, then
other shapes, formats, dtypes, ops, and torch.compile. Kernels that never met a GPU may crash or hang on one, so a
worker process does the work and this one watches: it starts a new one behind what broke and says so in the results.

Lines are appended to benchmarks/results/gpu-<device>.jsonl as they come; the last one holds the targets.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import gpu_step, report
from .cases import GPU_ROWS, GPU_SHAPES, IDEAL, Case, gpu_case, gpu_updates
from .providers import FORCED, OURS, foreign
from .run import RESULTS, measure
from .timing import machine, roof, synchronize

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480.0  # of the 540 that `make bench-gpu` may take
BUILD_SECONDS = 150.0
STALL_SECONDS = 120.0  # without a sign of life the worker is taken for hung; a cold compilation takes a few
FORGIVEN = 2  # crashes of one provider before the rest of the run goes without it

OURS_ALL = (OURS, *(f"zoact {name}" for name in FORCED))
INT4 = (*OURS_ALL, "torch unfused", "torch dense", "dense product", "aten int4 bf16", "aten int4 product")
NF4 = (*OURS_ALL, "torch unfused", "torch dense", "bitsandbytes")
COMPILED = (OURS, "torch compiled")


@dataclass(frozen=True)
class Job:
    """A case and who is timed at it, or a whole step of a model."""

    case: Case | None
    names: tuple[str, ...] = ()
    size: gpu_step.Size | None = None

    def __str__(self) -> str:
        return str(self.case) if self.case else f"step of {self.size.rows} rows" if self.size else "nothing"


def gpu_plan() -> Iterator[Job]:
    """Most important first."""
    others = GPU_SHAPES[1:]

    def linear(shapes: Sequence[str], names: tuple[str, ...], **changes: Any) -> Iterator[Job]:
        for shape in shapes:
            for M in GPU_ROWS:
                yield Job(gpu_case(shape, M, **changes), names)

    yield from linear([IDEAL], INT4)
    yield from (Job(None, (), size) for size in gpu_step.SIZES["cuda"])
    yield from linear(others, INT4)
    yield from linear([IDEAL], COMPILED)
    yield from linear([IDEAL], NF4, format="nf4")
    yield from linear(GPU_SHAPES, INT4, dtype="float16")
    yield from (Job(case, (OURS, "torch unfused", "bitsandbytes")) for case in gpu_updates("bfloat16"))
    yield from linear(GPU_SHAPES, INT4, rank=16)
    yield from linear(GPU_SHAPES, INT4, rank=16, dtype="float16")
    yield from linear(others, COMPILED)
    yield from linear(GPU_SHAPES, COMPILED, dtype="float16")


def smoke_plan() -> Iterator[Job]:
    """Each kind of job once, in seconds on a CPU."""
    for dtype in ("bfloat16", "float16"):
        yield Job(Case("smollm2-135m.k_proj", 4, dtype=dtype), INT4)
    yield Job(Case("smollm2-135m.k_proj", 2, "nf4", dtype="bfloat16"), NF4)
    yield Job(None, (), gpu_step.SIZES["cpu"][0])
    for case in gpu_updates("bfloat16"):
        if case.M <= 2:
            small = replace(case, shape="smollm2-135m.k_proj", residency="cache")
            yield Job(small, (OURS, "torch unfused", "bitsandbytes"))


PLANS = {"gpu": gpu_plan, "smoke": smoke_plan}
ROUNDS = {"gpu": None, "smoke": 3}


def jobs(plan: str, device: str) -> list[Job]:
    """The plan on a device, without the implementations of other devices."""
    found = []
    for job in PLANS[plan]():
        names = tuple(name for name in job.names if name not in foreign(device))
        found.append(replace(job, case=replace(job.case, device=device) if job.case else None, names=names))
    return found


# --- the worker -------------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Do the jobs from `first` on and append their rows; "@ job provider" on stdout says what is about to run."""
    without = set(options.without)
    found = [json.loads(line) for line in options.out.read_text().splitlines()]
    limits = next((line["roof"] for line in reversed(found) if line.get("run") == options.run and "roof" in line), None)

    def write(row: dict[str, Any]) -> None:
        with options.out.open("a") as file:
            file.write(json.dumps({"run": options.run, **row}) + "\n")

    def say(*words: object) -> None:
        print(*words, flush=True)

    if limits is None:
        say("@", options.first, "roof")
        limits = roof(options.device)
        write({"profile": options.plan, "machine": machine(), "roof": limits, "build": json.loads(options.build)})
        say(f"roof: {limits.get('flops', 0) / 1e12:.2f} TFLOP/s, {limits.get('memory_bandwidth', 0) / 1e9:.0f} GB/s")
    todo = jobs(options.plan, options.device)
    for number, job in list(enumerate(todo))[options.first :]:
        if time.time() > options.deadline:
            return
        if job.size is not None:
            say("@", number, "step")
            try:
                rows = gpu_step.measure(job.size, options.device, ROUNDS[options.plan])
            except Exception as error:
                note = f"{type(error).__name__}: {error}"[:500]
                write({"failed": str(job), "note": note})
                say(f"{job}  FAILED {note}")
                synchronize(options.device)
                continue
            for row in rows:
                write(row)
                say(f"{job}  {row['gpu_step']:>15}  {_brief(row, 'over_floor', 'floor')}")
            continue
        assert job.case is not None
        names = [name for name in job.names if name not in without and f"{number}:{name}" not in without]
        starting = lambda name, number=number: say("@", number, name)  # noqa: E731
        for row in measure(job.case, names, limits, True, ROUNDS[options.plan], starting):
            write(row)
            if row["status"] != "unsupported":
                say(f"{job}  {row['provider']:>17}  {_brief(row, 'over_ours', 'ours')}")
        synchronize(options.device)
        if options.device != "cpu":
            torch.cuda.empty_cache()


def _brief(row: dict[str, Any], over: str, what: str) -> str:
    if "seconds" not in row:
        return f"{row.get('status', '').upper()} {row.get('note', row.get('relerr', ''))}"
    ratio = row.get(over, {}).get("p50", float("nan"))
    return f"{row['seconds']['p50'] * 1e6:10.1f} µs  {ratio:6.2f} x {what}  {row.get('chosen', '')}"


# --- the one who watches ----------------------------------------------------------------------------------------------


def watch(options: argparse.Namespace, build: dict[str, Any]) -> None:
    """Run workers until the plan is done or the deadline has come."""
    todo = jobs(options.plan, options.device)
    first, without = 0, set(options.without)
    crashes: Counter[str] = Counter()
    while first < len(todo) and time.time() < options.deadline:
        command = [
            sys.executable, "-m", "benchmarks.gpu", "--plan", options.plan, "--device", options.device,
            "--out", str(options.out), "--worker", "--run", options.run, "--first", str(first),
            "--deadline", str(options.deadline), "--build", json.dumps(build),
            *(word for name in sorted(without) for word in ("--without", name)),
        ]  # fmt: skip
        at, name, why = _one_worker(command, options.deadline)
        if why is None:
            break
        note = f"{name} broke: {why}"
        print(f"{todo[at] if at < len(todo) else at}  {note}", flush=True)
        case = asdict(todo[at].case) | {"provider": name, "status": "crashed"} if todo[at].case else {}
        with options.out.open("a") as file:
            file.write(json.dumps({"run": options.run, **case, "failed": str(todo[at]), "note": note}) + "\n")
        crashes[name] += 1
        without.add(f"{at}:{name}")
        if crashes[name] >= FORGIVEN:
            without.add(name)
        if name in ("start", "roof"):  # nothing runs on a device that can't even copy
            break
        first = at if name in todo[at].names else at + 1  # a step, or the timing of several: not once more


def _one_worker(command: list[str], deadline: float) -> tuple[int, str, str | None]:
    """(job, provider it was at, why it broke or None): a process, killed where it stalls or outlives the deadline."""
    lines: queue.Queue[str | None] = queue.Queue()
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    at, name, last, heard = 0, "start", "", time.time()
    try:
        while True:
            try:
                line = lines.get(timeout=1)
            except queue.Empty:
                if time.time() > deadline + 10:
                    return at, name, None
                if time.time() - heard > STALL_SECONDS:
                    return at, name, f"no sign of life for {STALL_SECONDS:.0f} s"
                continue
            heard = time.time()
            if line is None:
                code = process.wait()
                return at, name, None if code == 0 else f"exit {code}: {last}"
            if line.startswith("@ "):
                _, number, name = line.split(" ", 2)
                at = int(number)
            else:
                last = line or last
                print(line, flush=True)
    finally:
        process.kill()
        process.wait()


def build_kernels(device: str, seconds: float) -> dict[str, Any]:
    """Compile csrc in place for this GPU alone, where there are compilers; what came of it, never an error."""
    environment = {**os.environ, "ZOACT_BUILD_CPU": "auto", "ZOACT_BUILD_CUDA": "auto"}
    if device == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        environment["ZOACT_CUDA_ARCHS"] = f"{major}{minor}" + ("a" if major == 9 else "")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    start = time.time()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
        outcome: dict[str, Any] = {"exit": process.returncode}
        if process.returncode:
            outcome["error"] = said[-1000:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its compilers too: they hold the pipe
        process.communicate()
        outcome = {"exit": None, "error": f"not done within {seconds:.0f} s"}
    record = ROOT / "zoact_kernels" / "_build.json"
    if record.exists():
        outcome["record"] = json.loads(record.read_text())
    return {**outcome, "seconds": round(time.time() - start, 1)}


def results_file(device: str) -> Path:
    """Where a run on this device goes; on the CPU, which only rehearses one, not among the results."""
    if device == "cpu":
        return ROOT / "build" / "gpu-none.jsonl"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return RESULTS / f"gpu-{name}.jsonl"


def conclude(options: argparse.Namespace, start: float) -> list[report.Target]:
    """Judge the file's rows by the targets; append the verdicts and what was skipped."""
    found = report.load([options.out])
    targets = report.gpu_targets(found.rows, found.gpu_steps)
    lines = [json.loads(line) for line in options.out.read_text().splitlines()]
    run = [line for line in lines if line["run"] == options.run]
    timed: set[Any] = {_identity(line) for line in run if "provider" in line}
    timed |= {line["rows"] for line in run if "gpu_step" in line}
    skipped = [str(job) for job in jobs(options.plan, options.device) if _job_identity(job) not in timed]
    with options.out.open("a") as file:
        told = [target._asdict() | {"verdict": target.verdict} for target in targets]
        seconds = round(time.time() - start, 1)
        file.write(json.dumps({"run": options.run, "targets": told, "skipped": skipped, "seconds": seconds}) + "\n")
    if skipped:
        print(f"not measured, for want of time or because they broke: {len(skipped)} jobs, from {skipped[0]!r} on")
    for target in targets:
        print(target)
    print(f"results: {options.out}")
    return targets


def _identity(row: dict[str, Any]) -> tuple:
    return tuple(row[key] for key in asdict(Case("", 0)))


def _job_identity(job: Job) -> Any:
    return tuple(asdict(job.case).values()) if job.case else job.size.rows if job.size else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", choices=sorted(PLANS), default="gpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-<device>.jsonl")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what is left after that is skipped")
    parser.add_argument("--without", action="append", default=[], metavar="PROVIDER", help="leave one out")
    parser.add_argument("--no-build", action="store_true", help="take the compiled kernels as they are")
    for name, kind in (("run", str), ("first", int), ("deadline", float), ("build", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device here")
    if options.worker:
        work(options)
        return
    start = time.time()
    options.deadline = start + options.seconds
    options.out = (options.out or results_file(options.device)).absolute()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.touch()
    options.run = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(start))
    print(f"results: {options.out}, as they come", flush=True)
    build = {} if options.no_build else build_kernels(options.device, min(BUILD_SECONDS, options.seconds / 3))
    if build:
        why = build.get("error") or build.get("record", {}).get("why_no_cuda") or "done"
        print(f"building csrc: {why.strip().splitlines()[-1]} ({build['seconds']} s)", flush=True)
    watch(options, build)
    conclude(options, start)


if __name__ == "__main__":
    main()
