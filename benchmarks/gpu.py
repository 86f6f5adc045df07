"""Measure merges on a CUDA GPU; compares them with a plain pinned copy to the GPU and with mergekit --cuda.

    python -m benchmarks.gpu [--models DIRECTORY] [--size 8b] [--mergekit ENVIRONMENT] [--budgets 2GiB 8GiB]

The models and OUT are in memory (tmpfs), to keep the disk out of the measurement: at 8B shapes three models and an
output take 64 GB of RAM. Without a GPU it prints a message and changes nothing. Exits with 1 if --max-vram was exceeded
or the GPU's output differs from the CPU's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import compare
from benchmarks.budgets import digest
from benchmarks.compare import DOCUMENT, RESULTS, Bench, Case
from benchmarks.make_models import SIZES, make_models
from benchmarks.process import machine, run
from benchmarks.tables import put_between_markers

CASES = {
    "linear": Case("a b", "", "weight: 0.5"),
    "slerp": compare.CASES["slerp"],
    "ties": Case("base a b", "", "weight: 0.5, density: 0.5"),
}
COPIED = 1 << 30
REPEATS = 20
WANTED_RATE = 0.7
"""What linear and ties are meant to reach of the pinned copy's rate."""
WANTED_RATIO = 20
"""How many times faster than mergekit --cuda slerp is meant to be."""


def copy_rate(device: int = 0) -> float:
    """Bytes a second of copies from pinned memory to a GPU, one after the other: the median of them."""
    import torch

    host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPIED, dtype=torch.uint8, device=f"cuda:{device}")
    rates = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        there.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        rates.append(COPIED / (begin.elapsed_time(end) / 1000))
    return statistics.median(rates)


def gpu_name() -> str | None:
    """The first GPU, with its driver's CUDA; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def measure(bench: Bench, method: str, options: list[str]) -> dict[str, Any]:
    """One merge by mergeloom, as a process: figures from its report, its total time, and the output's digest."""
    report = bench.work / "report.json"
    shutil.rmtree(bench.out, ignore_errors=True)
    try:
        timed = run([*bench.command("mergeloom", method), *options, "--report", str(report)])
        said = json.loads(report.read_text())
        return {
            "method": method,
            "options": " ".join(options),
            "seconds": round(timed.seconds, 2),
            "merge_seconds": round(said["measured"]["seconds"], 2),
            "bytes_read": said["measured"]["bytes_read"],
            "max_vram": said["max_vram"],
            "peak_vram": said["measured"]["peak_vram"],
            "digest": digest(bench.out),
        }
    finally:
        shutil.rmtree(bench.out, ignore_errors=True)


def broken(results: dict[str, Any]) -> list[str]:
    """What doesn't hold of the promises."""
    found = []
    for row in results["rows"]:
        name = f"{row['method']} {row['options']}"
        if row["max_vram"] and row["peak_vram"] > row["max_vram"]:
            found.append(f"{name}: {row['peak_vram']:,} bytes of VRAM, of {row['max_vram']:,}")
        if any(row["digest"] != other["digest"] for other in results["rows"] if other["method"] == row["method"]):
            found.append(f"{name}: other bytes than with other options")
    return found


def text(results: dict[str, Any]) -> str:
    """The results as a table."""
    rate = results["copy_rate"]
    lines = [
        "| method | options | seconds | of them merging | read, GB/s | of a pinned copy | peak VRAM, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        read = row["bytes_read"] / row["merge_seconds"]
        lines.append(
            f"| `{row['method']}` | `{row['options']}` | {row['seconds']:.1f} | {row['merge_seconds']:.1f} "
            f"| {read / 1e9:.2f} | {read / rate:.2f} | {row['peak_vram'] / 2**30:.2f} |"
        )
    for method, seconds in results["mergekit"].items():
        ours = min(row["seconds"] for row in results["rows"] if row["method"] == method and row["max_vram"])
        lines.append(f"| `{method}` | mergekit `--cuda` | {seconds:.1f} | | | | {seconds / ours:.1f} times our time |")
    about = results["machine"]
    wrong = broken(results)
    lines += [
        "",
        f"{results['size']} shapes in memory; a pinned copy to the GPU runs at {rate / 1e9:.1f} GB/s. Wanted: "
        f"{WANTED_RATE} of that rate for linear and ties, and slerp {WANTED_RATIO} times faster than mergekit. "
        f"{'; '.join(wrong) if wrong else 'No budget was exceeded, and the bytes are those of the CPU'}. "
        f"{results['gpu']}; {about['cpu']}, {about['cores']} cores; {about['date']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="default: a folder in /dev/shm, made and removed")
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--budgets", nargs="+", default=["2GiB", "8GiB"])
    parser.add_argument("--mergekit", type=Path, help="an environment with mergekit and CUDA; else it isn't run")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    gpu = gpu_name()
    if gpu is None:
        print("There is no CUDA GPU here: nothing was measured.")
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    models = arguments.models or Path("/dev/shm/mergeloom-bench-models")
    try:
        results = measure_all(models, gpu, arguments)
    finally:
        if arguments.models is None:
            shutil.rmtree(models, ignore_errors=True)
    put_between_markers(arguments.document, "gpu", text(results))
    wrong = broken(results)
    print("\n".join(wrong))
    sys.exit(bool(wrong))


def measure_all(models: Path, gpu: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that the command line asks for; it is written to benchmarks/results/gpu.json as it comes."""
    make_models(models, arguments.size, sorted({name for m in arguments.methods for name in CASES[m].inputs.split()}))
    results: dict[str, Any] = {
        "gpu": gpu,
        "machine": machine(),
        "size": arguments.size.upper(),
        "copy_rate": copy_rate(),
        "rows": [],
        "mergekit": {},
    }
    with tempfile.TemporaryDirectory(prefix="mergeloom-bench-") as work:
        bench = Bench(
            models=models.absolute(),
            work=Path(work),
            out=Path(f"/dev/shm/mergeloom-bench-out-{os.getpid()}"),
            on_disk=False,
            cold=False,
            memory=0,
            mergekit=(arguments.mergekit or Path()).absolute(),
            first=Path(),
            threads=os.cpu_count() or 1,
            quiet=10,
            mergekit_flags=("--cuda",),
            mergeloom_flags=(),
            cases=CASES,
        )
        for method in arguments.methods:
            for options in (["--device", "cpu"], *(["--device", "cuda", "--max-vram", b] for b in arguments.budgets)):
                row = measure(bench, method, options)
                results["rows"].append(row)
                print(f"{method:16} {row['options']:32} {row['seconds']} s, {row['peak_vram']:,} bytes", flush=True)
            if arguments.mergekit:
                seconds = bench.measure("mergekit", method)["seconds"]
                results["mergekit"][method] = seconds
                print(f"{method:16} {'mergekit --cuda':32} {seconds} s", flush=True)
            (RESULTS / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
