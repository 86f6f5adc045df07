"""Measure the merge of two 671B models in FP8 blocks of 128 x 128, at DeepSeek-V3's true shapes.

    python -m benchmarks.giants.fp8 [--work DIRECTORY] [--parts planning layer layers] [--runs 1]

`planning` plans the complete merge, of files without data. `layer` merges one layer of experts with random data, 11.5
GB of each model, to FP8 in 4 GiB, and estimates the complete merge on 16 cores and disks of 5 GB/s. `layers` merges 6
of the 61 layers of files without data, and compares the bytes that are read and written with the plan; it exits with 1
if they differ. DIRECTORY needs 35 GiB on a disk, and 45 GiB for `layers`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import DOCUMENT
from benchmarks.giants.merges import BUDGET, fastest_plan, merge, plan_of
from benchmarks.process import cool, machine, shards, tensor_bytes, wait_for_quiet
from benchmarks.tables import put_between_markers

SHARD_BYTES = 4 << 30
_POOL, _PIECE = 1 << 24, 8 << 20
"""Number of random codes, and of those that are written at a time."""
_LAYER = "model.layers.0."


# ------------------------------------------------------------------------------------------------ models


def one_layer() -> Any:
    """The layer of experts that comes after the dense ones, as a model of one layer."""
    from tests.support.models import deepseek_v3

    complete = deepseek_v3(layers=4, mtp=False)
    own, old = re.compile(r"model\.layers\.3\."), complete.tensors
    names = {name: own.sub(_LAYER, name) for name in old if own.match(name)}
    config = complete.config | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    dtypes = {names[name]: dtype for name, dtype in complete.dtypes.items() if name in names}
    return replace(complete, tensors={new: old[name] for name, new in names.items()}, config=config, dtypes=dtypes)


def fill(directory: Path, seed: int) -> None:
    """Give the tensors of a model random values: codes of normal numbers, and scales that vary by a factor of two."""
    from tests.support.models import encode

    random = np.random.default_rng(seed)
    codes = encode(random.standard_normal(_POOL, np.float32) * np.float32(64), "F8_E4M3")
    for shard in shards(directory):
        with shard.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for entry in (entry for name, entry in header.items() if name != "__metadata__"):
                begin, end = entry["data_offsets"]
                file.seek(8 + size + begin)
                for data in _values(entry["dtype"], prod(entry["shape"]), codes, random):
                    file.write(data)
                assert file.tell() == 8 + size + end


def _values(dtype: str, count: int, codes: memoryview, random: np.random.Generator) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, piece by piece."""
    from tests.support.models import encode

    if dtype != "F8_E4M3":
        yield encode(random.uniform(1e-4, 2e-4, count).astype(np.float32), dtype)
        return
    for first in range(0, count, _PIECE):
        place = int(random.integers(0, _POOL - _PIECE))
        yield codes[place : place + min(_PIECE, count - first)]


def pair(work: Path, model: Any, *, random: bool) -> Path:
    """Write two models; return the recipe of their mean, which is written in FP8."""
    from tests.support.models import write_checkpoint

    lines = ["merge_method: linear", "models:"]
    for seed, name in enumerate("ab"):
        directory = write_checkpoint(work / name, model, fill=None, shard_bytes=SHARD_BYTES)
        if random:
            fill(directory, seed)
        lines.append(f"  - {{model: {directory}, parameters: {{weight: 0.5}}}}")
    os.sync()
    recipe = work / "recipe.yml"
    recipe.write_text("\n".join(lines) + "\n")
    return recipe


# ------------------------------------------------------------------------------------------------ measurements


@dataclass(frozen=True, slots=True)
class Part:
    """Something to measure.

    Args:
        measure: function of the directory for models and output, and the number of runs; it returns lines of text.
        needs: bytes that it needs on the disk.
    """

    measure: Callable[[Path, int], list[str]]
    needs: int


def planning(work: Path, runs: int) -> list[str]:
    """Plan the complete merge."""
    from tests.support.models import deepseek_v3

    recipe = pair(work, deepseek_v3(), random=False)
    return [f"- `plan` of both models, 91,991 tensors each: {fastest_plan(recipe, runs)}"]


def layer(work: Path, runs: int) -> list[str]:
    """Merge one layer, and estimate the complete merge."""
    model = one_layer()
    recipe = pair(work, model, random=True)
    inputs = [shard for name in "ab" for shard in shards(work / name)]
    weights = sum(prod(shape) for name, shape in model.tensors.items() if not name.endswith("_scale_inv"))
    lines = []
    for _ in range(runs):
        cool(inputs)
        wait_for_quiet(10)
        report = merge(recipe, work / "out")
        measured, seconds = report["measured"], report["measured"]["seconds"]
        moved = measured["bytes_read"] + measured["bytes_written"]
        lanes = ", ".join(f"{name} {each['worked']:.1f}" for name, each in measured["lanes"].items())
        lines.append(
            f"- one layer of experts, {weights / 1e9:.1f}G weights of each model, FP8 to FP8 in {BUDGET}: "
            f"{seconds:.1f} s, {moved / seconds / 1e9:.2f} GB/s read and written together, "
            f"{1e9 * seconds / weights:.2f} ns per weight, peak RSS (VmHWM) {measured['peak_rss'] / 1e6:.0f} MB; "
            f"seconds of work in each lane: {lanes}"
        )
        shutil.rmtree(work / "out")
    for name in "ab":
        shutil.rmtree(work / name)
    return [*lines, *estimated(work)]


def estimated(work: Path) -> list[str]:
    """Estimate the complete merge on another machine, with the speed of computing measured on this one."""
    from tests.support.models import deepseek_v3

    recipe = pair(work, deepseek_v3(), random=False)
    target = ["--for", "ram=64GiB,cores=16", "--rates", "disk_read=5GB/s,disk_write=5GB/s"]
    found = plan_of(recipe, "--time", *target)["time"]
    slowest = max(found["lanes"], key=lambda name: found["lanes"][name]["seconds"])
    return [
        f"- the complete merge on 16 cores and disks of 5 GB/s, by `plan --time {' '.join(target)}`: "
        f"{found['seconds'] / 60:.0f} minutes ({found['low'] / 60:.0f} to {found['high'] / 60:.0f}), limited by "
        f"{slowest}"
    ]


def layers(work: Path, runs: int) -> list[str]:
    """Merge 6 of the 61 layers of files without data, and compare what it reads and writes with the plan."""
    from tests.support.models import deepseek_v3

    recipe = pair(work, deepseek_v3(layers=6, mtp=False), random=False)
    planned, report = plan_of(recipe, "--max-ram", BUDGET), merge(recipe, work / "out")
    keys = ("bytes_read", "bytes_written")
    expected = [planned[key] for key in keys]
    executed = [report["measured"][key] for key in keys]
    stored = [sum(tensor_bytes(work / name) for name in "ab"), tensor_bytes(work / "out")]
    if not expected == executed == stored:
        raise SystemExit(f"planned {expected}, executed {executed}, stored {stored} bytes")
    return [
        f"- 6 of the 61 layers, files without data: {executed[0]:,} bytes read and {executed[1]:,} written, as "
        "planned, and as the headers say"
    ]


PARTS = {"planning": Part(planning, 1 << 30), "layer": Part(layer, 35 << 30), "layers": Part(layers, 45 << 30)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    lines: list[str] = []
    for name in arguments.parts:
        with tempfile.TemporaryDirectory(prefix="mergeloom-giant-", dir=arguments.work) as work:
            if shutil.disk_usage(work).free < PARTS[name].needs:
                raise SystemExit(f"{name} needs {PARTS[name].needs >> 30} GiB on the disk of {work}")
            lines += PARTS[name].measure(Path(work), arguments.runs)
        print("\n".join(lines), flush=True)
    about = machine()
    lines.append(f"\nInputs not in the page cache. {about['cpu']}, {about['cores']} cores; {about['date']}.")
    if arguments.parts == list(PARTS):
        put_between_markers(arguments.document, "giant", "\n".join(lines))


if __name__ == "__main__":
    main()
