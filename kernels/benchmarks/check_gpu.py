"""Everything that runs on a GPU, in one go: `python kernels/benchmarks/check_gpu.py [--only host bench] [--out FOLDER]`.

    compile        every kernel of the benchmark, in processes side by side that fill triton's cache      untimed, with
    cases          kernels/tests/triton_cases.py and the model's GPU tests, in shares                     each other
    host           host_time.py       what one eager call costs the host
    bench          bench_gpu.py       layers against cuBLAS
    llama2-7b      models_gpu.py      whole models against dense ones
    train          step_speed.py      a training step of latent layers against a dense one
    llama-3.2-1b   models_gpu.py
    generate       tests/gpu_generate.py, where it is there

Made for a short time on a rented GPU (eight minutes with 16 cores): every part is a process of its own with a time limit,
writes its figures after every row, and may fail without the others. The document is written after every part, to
kernels/benchmarks/results/<device>-<date>.json or to FOLDER, beside check-gpu.log. Prints the marks (marks.py) at the end;
`--summary FILES` prints those of documents that were written before, together.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from marks import marks, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PARTS = ("compile", "cases", "host", "bench", "llama2-7b", "train", "llama-3.2-1b", "generate")
LIMITS = {
    "compile": 165,
    "cases": 165,
    "host": 45,
    "bench": 110,
    "llama2-7b": 190,
    "train": 50,
    "llama-3.2-1b": 90,
    "generate": 60,
}
SECONDS = 470  # of all parts
LEAST = 20  # seconds below which no part is begun
TAIL = 1500  # characters of a failed part's output that the document keeps
CASES = (  # those that there are
    "kernels/tests/triton_cases.py",
    "kernels/tests/triton_cases_groups.py",
    "tests/test_prompt_graph.py",
    "tests/test_decode_graph.py",
    "tests/test_decode_lifetime.py",
    "tests/test_decode_refusals.py",
    "tests/test_decode_threads.py",
)
QUERY = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit", "temperature.gpu", "memory.total")
TRAINING = ("--hidden", "4096", "--layers", "2", "--tokens", "2048", "--bf16", "--bpw", "0.3", "0.55")


class Job(NamedTuple):
    """A process of a part."""

    part: str
    name: str
    command: List[str]
    environment: Optional[Dict[str, str]] = None


def python(script: str, *arguments: Any) -> List[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def jobs_of(part: str, folder: Path, cores: int, limit: float, with_models: bool) -> List[Job]:
    """The processes of a part, which write into `folder`."""
    out, late = folder / f"{part}.json", max(5, int(limit) - 15)
    single = {"OMP_NUM_THREADS": "1"}
    bench = "kernels/benchmarks/bench_gpu.py"
    if part == "compile":
        count = max(1, cores // 2)
        jobs = [
            Job(
                part,
                f"compile-{index}",
                python(bench, "--gradient", "--shared", "--warm", f"{index}/{count}", "--seconds", late),
                single,
            )
            for index in range(1, count + 1)
        ]
        if with_models:
            models = python("kernels/benchmarks/models_gpu.py", "llama2-7b", "--warm", "--modes", "compiled", "plain")
            jobs.append(Job(part, "compile-models", models))
        return jobs
    if part == "cases":
        count = max(1, cores // 2 - 1)
        options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "share", "--tb=short")
        found = []
        for file in CASES:
            # The kernels' cases are many and compile; the others are few.
            parts = count if "triton_cases.py" in file else 1
            for index in range(1, parts + 1 if (ROOT / file).exists() else 0):
                name = f"{Path(file).stem}-{index}"
                claims = folder / f"{Path(file).stem}-claims"
                claims.mkdir(exist_ok=True)
                environment = {
                    **single,
                    "LITTLEBIT_BACKEND": "triton" if "triton_cases" in file else "",
                    "LITTLEBIT_SHARE": str(claims),
                    "LITTLEBIT_RESULTS": str(folder / f"{name}.lines"),
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
                }
                found.append(Job(part, name, [sys.executable, *options, str(ROOT / file)], environment))
        return found
    if part == "host":
        return [Job(part, part, python("kernels/benchmarks/host_time.py", "--out", out))]
    if part == "bench":
        return [Job(part, part, python(bench, "--gradient", "--shared", "--seconds", late, "--out", out))]
    if part == "train":
        return [Job(part, part, python("examples/experiments/step_speed.py", *TRAINING, "--out", out))]
    if part == "generate":
        there = (ROOT / "tests/gpu_generate.py").exists()
        return [Job(part, part, python("tests/gpu_generate.py", "--json", out))] if there else []
    return [Job(part, part, python("kernels/benchmarks/models_gpu.py", part, "--seconds", late, "--out", out))]


def run(jobs: List[Job], limit: float, folder: Path, log: Any) -> Dict[str, Dict[str, Any]]:
    """Run processes side by side; {name: how it went}. What exceeds the limit is ended, with all that it started."""
    start, running, done = time.monotonic(), {}, {}
    for job in jobs:
        output = open(folder / f"{job.name}.log", "w")  # noqa: SIM115 closed below
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **(job.environment or {}),
        }
        environment.setdefault("HF_HUB_OFFLINE", "1")
        process = subprocess.Popen(
            job.command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        running[job.name] = (job, process, output)
    while running:
        late = time.monotonic() - start > limit
        for name, (job, process, output) in list(running.items()):
            code = process.poll()
            if code is None and not late:
                continue
            if code is None:
                stop(process)
            output.close()
            text = (folder / f"{name}.log").read_text(errors="replace")
            log.write(f"===== {name}: {code if code is not None else 'ended at its limit'}\n{text[-12000:]}\n")
            log.flush()
            done[name] = {"part": job.part, "rc": code, "seconds": round(time.monotonic() - start, 1)}
            if code != 0:
                done[name]["tail"] = text[-TAIL:]
            del running[name]
        time.sleep(0.05)
    return done


def stop(process: "subprocess.Popen") -> None:
    """End a process and all of its session."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=3)
            break
        except subprocess.TimeoutExpired:
            continue


def result_of(part: str, folder: Path) -> Any:
    """What the part wrote: the document of its script, or the counts of its tests; None if nothing."""
    if part == "cases":
        lines = [line for file in sorted(folder.glob("*.lines")) for line in file.read_text().splitlines()]
        tests = [json.loads(line) for line in lines if line.endswith("}")]
        if not tests:
            return None
        failures = [test for test in tests if test["outcome"] == "failed"]
        return {"counts": dict(Counter(test["outcome"] for test in tests)), "failures": failures[:40]}
    file = folder / f"{part}.json"
    try:
        text = file.read_text()
        return json.loads(text) if text.count("\n{") == 0 else [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):
        return None


def device() -> Dict[str, Any]:
    """The GPU as its driver and torch describe it."""
    import torch

    found: Dict[str, Any] = {"name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    tool = shutil.which("nvidia-smi")
    if tool:
        asked = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
            found.update(zip(QUERY, done.stdout.splitlines()[0].split(", ")))  # noqa: B905 Python 3.9
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            found["nvidia-smi"] = str(error)[:200]
    return found


def versions() -> Dict[str, Any]:
    from importlib import metadata

    found: Dict[str, Any] = {"python": sys.version.split()[0], "cores": len(os.sched_getaffinity(0))}
    for package in ("torch", "triton", "transformers", "hf-littlebit"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def check(chosen: List[str], out: Path, seconds: float) -> int:
    """Run the parts and write the document; the exit code."""
    about, start = device(), time.monotonic()
    name = re.sub(r"[^a-z0-9]+", "-", about["name"].lower()).strip("-")
    name += f"-{datetime.date.today()}" + ("" if set(chosen) == set(PARTS) else "-" + "-".join(chosen))
    out.mkdir(parents=True, exist_ok=True)
    document: Dict[str, Any] = {"benchmark": "check_gpu", "device": about, "versions": versions(), "parts": {}}
    parts, cores = document["parts"], document["versions"]["cores"]

    def save() -> None:
        document["seconds"] = round(time.monotonic() - start, 1)
        document["marks"] = [{**mark._asdict(), "verdict": mark.verdict} for mark in marks(parts)]
        (out / f"{name}.json").write_text(json.dumps(document) + "\n")

    # What is not timed runs side by side; the rest one after the other.
    untimed = [part for part in ("compile", "cases") if part in chosen]
    groups = [untimed] if untimed else []
    groups += [[part] for part in PARTS if part in chosen and part not in untimed]
    with tempfile.TemporaryDirectory() as folder, open(out / "check-gpu.log", "w") as log:
        for group in groups:
            left = seconds - (time.monotonic() - start)
            limit = min(left, max(LIMITS[part] for part in group))
            if left < LEAST:
                parts.update({part: {"left_out": f"{left:.0f} s were left, {LEAST} are needed"} for part in group})
                continue
            share = max(2, cores) if len(group) > 1 else max(2, 2 * cores - 2)
            jobs = [job for part in group for job in jobs_of(part, Path(folder), share, limit, "llama2-7b" in chosen)]
            print(f"{time.monotonic() - start:4.0f} s: {', '.join(group)} ({len(jobs)} processes)", flush=True)
            done = run(jobs, limit, Path(folder), log)
            for part in group:
                if not any(job.part == part for job in jobs):
                    parts[part] = {"left_out": "its script is not there", "ok": True}
                    continue
                mine = {key: value for key, value in done.items() if value["part"] == part}
                parts[part] = {
                    "ok": all(value["rc"] == 0 for value in mine.values()),
                    "seconds": max((value["seconds"] for value in mine.values()), default=0.0),
                    "result": result_of(part, Path(folder)),
                    "failed": {key: value for key, value in mine.items() if value["rc"] != 0},
                }
                print(
                    f"      {part}: {'ok' if parts[part]['ok'] else 'FAILED'}, {parts[part]['seconds']} s", flush=True
                )
            save()
    document["device_after"] = device()
    save()
    print(table(marks(parts)))
    print(f"wrote {out / name}.json in {document['seconds']} s")
    return 0 if all(part.get("ok") for part in parts.values()) else 1


def summary(files: List[Path]) -> str:
    """The marks of several documents together; a part counts where it was measured last."""
    parts: Dict[str, Any] = {}
    for file in files:
        parts.update({name: part for name, part in json.loads(file.read_text())["parts"].items() if part.get("result")})
    return table(marks(parts))


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run", metavar="PART")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts (default: {SECONDS})")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--summary", type=Path, nargs="+", metavar="FILE", help="print the marks of these documents")
    options = parser.parse_args(arguments)
    if options.summary:
        print(summary(options.summary))
        return 0
    import torch

    if not torch.cuda.is_available():
        print("this checks a CUDA or ROCm GPU, and torch finds none", file=sys.stderr)
        return 1
    return check(options.only, options.out, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
