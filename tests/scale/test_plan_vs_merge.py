"""Plans match the merges that follow them and, at the largest real shapes, the sizes that the shapes give.

Expected sizes are computed here from tables of shapes, without the product's code. Planned bytes are compared with the
merge's counters, the counters with the system calls that strace records, and memory with the kernel's VmHWM.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergeloom
from mergeloom.engine.cost.machine import Machine
from mergeloom.engine.run.placement import with_reflinks
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.io.units import data_size
from tests.conftest import MakeModel
from tests.support import models
from tests.support.plans import Recipe, linear, slerp, stacked, task_vectors, windows
from tests.support.shapes import Shapes, big_llama_681b, mixture_of_experts

PYTHON = [sys.executable, "-m", "mergeloom"]
BF16 = 2
GIB = 1 << 30


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run mergeloom in a process of its own."""
    return subprocess.run([*PYTHON, *map(str, arguments)], capture_output=True, text=True, check=False)


def written(path: Path, recipe: Recipe) -> Path:
    """A recipe as a file."""
    path.write_text(yaml.safe_dump(recipe))
    return path


# ------------------------------------------------------------------------------------------------ true shapes


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with true headers and holes for data."""
    root = tmp_path_factory.mktemp("sparse")
    for name in ("405b", "405b-x", "405b-y"):
        models.write_checkpoint(root / name, models.llama_3_1_405b(), shard_bytes=4_500_000_000, fill=None)
    models.write_checkpoint(root / "681b", big_llama_681b(), shard_bytes=4_500_000_000, fill=None)
    for name in ("moe", "moe-x"):
        models.write_checkpoint(root / name, mixture_of_experts(), shard_bytes=4_500_000_000, fill=None)
    return root


PLANNING = """
import json, sys
from mergeloom.engine.cost.machine import process_memory
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.report.plan import plan_text
recipe = json.loads(sys.argv[1])
found = plan(recipe, Options(device="cpu", threads=2, max_ram=int(sys.argv[2])))
text = plan_text(found)
said = found.to_dict()
del said["inputs"]["unused"]
print(json.dumps({"plan": said, "rss": process_memory().peak}))
assert "torch" not in sys.modules
"""


def planned(recipe: Recipe, ram: int = 8 * GIB) -> dict[str, Any]:
    """What a process of its own plans, and the memory that it took."""
    arguments = [sys.executable, "-c", PLANNING, json.dumps(recipe), str(ram)]
    found: dict[str, Any] = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    return found


@pytest.mark.parametrize("kind", ["681B", "1T"])
def test_frankenmerges_of_405b(kind: str, sparse: Path) -> None:
    if kind == "681B":
        source, model, slices = sparse / "405b", models.llama_3_1_405b(), [(f, f + 42) for f in range(0, 105, 21)]
    else:
        source, model, slices = sparse / "681b", big_llama_681b(), [(0, 105), (52, 157), (104, 209)]
    found = planned(stacked(*((source, part) for part in slices)))
    layers, tensors, elements, needed = Shapes.of(model).stack(slices)
    said = found["plan"]
    assert said["output"]["layers"] == layers == {"681B": 210, "1T": 315}[kind]
    assert said["output"]["tensors"] == tensors
    assert said["output"]["parameters"] == elements == {"681B": 673_620_508_672, "1T": 1_008_329_408_512}[kind]
    assert said["output"]["bytes"] == said["bytes_written"] == elements * BF16
    assert said["bytes_read"] == needed * BF16
    assert said["bytes_reread"] == 0
    assert 0 < said["disk"] - elements * BF16 < 2_000_000  # headers
    assert said["output"]["shards"] >= elements * BF16 / 5e9
    assert said["peak_ram"] < 256 << 20


def test_a_ties_of_three_405b(sparse: Path) -> None:
    recipe = task_vectors("ties", sparse / "405b", sparse / "405b-x", sparse / "405b-y")
    shapes = models.llama_3_1_405b().tensors
    total = sum(map(prod, shapes.values())) * BF16
    embedding = prod(shapes["model.embed_tokens.weight"]) * BF16
    roomy = planned(recipe, 16 * GIB)["plan"]
    assert roomy["output"]["parameters"] == total // BF16 == 405_853_388_800
    assert roomy["output"]["tensors"] == len(shapes) == 1137
    assert (roomy["bytes_read"], roomy["bytes_written"], roomy["bytes_reread"]) == (3 * total, total, 0)

    said = planned(recipe)["plan"]
    assert said["bytes_read"] == 3 * total + said["bytes_reread"]
    passes = said["peak_ram_at"]["passes"]
    # all but the embedding and the head fit 8 GiB three times; of these the rest is read again in each further pass
    again = 2 * (passes - 1) * (3 * embedding - 8 * GIB)
    assert again < said["bytes_reread"] < again + 2 * (passes - 1) * GIB
    assert {group["pattern"] for group in said["read_again"]} == {"model.embed_tokens.weight", "lm_head.weight"}
    least = planned(recipe, said["minimum_ram"] + (1 << 20))["plan"]
    assert 0.9 * passes * 3 * total < least["bytes_read"] <= passes * 3 * total
    assert least["peak_ram"] <= said["minimum_ram"] + (1 << 20)


def test_a_ties_of_three_405b_on_a_gpu_that_is_not_here(sparse: Path) -> None:
    recipe = task_vectors("ties", sparse / "405b", sparse / "405b-x", sparse / "405b-y")
    shapes = models.llama_3_1_405b().tensors
    total = sum(map(prod, shapes.values())) * BF16
    found = plan(recipe, Options(machine=Machine(ram=64 * GIB, vram=24 * GIB, cores=16)))
    said = found.to_dict()
    assert said["bytes_read"] == said["bytes_uploaded"] == 3 * total  # 3 x 4.2 GB fit 85% of 24 GiB: uploaded once
    assert said["bytes_downloaded"] == said["bytes_written"] == total
    assert 3 * prod(shapes["model.embed_tokens.weight"]) * BF16 < said["peak_vram"] <= 0.85 * 24 * GIB
    assert said["peak_ram"] <= said["max_ram"] == int(0.7 * 64 * GIB)


def test_a_linear_of_two_mixtures_of_experts(sparse: Path) -> None:
    shapes = mixture_of_experts().tensors
    total = sum(map(prod, shapes.values())) * BF16
    assert len(shapes) > 90_000
    found = planned(linear(sparse / "moe", sparse / "moe-x"))
    said = found["plan"]
    assert said["output"]["tensors"] == said["steps"] == len(shapes)
    assert said["inputs"]["tensors"] == 2 * len(shapes)
    assert said["output"]["layers"] == 61
    assert said["output"]["parameters"] == total // BF16 > 671e9
    assert (said["bytes_read"], said["bytes_written"], said["bytes_reread"]) == (2 * total, total, 0)
    assert [model["used"] for model in said["bytes_by_model"]] == [total, total]
    assert found["rss"] < GIB


# ------------------------------------------------------------------------------------------------ what a merge does


def recipes(base: Path, a: Path, b: Path, layers: int) -> dict[str, Recipe]:
    """One recipe of each kind."""
    half = layers // 2
    return {
        "linear": linear(a, b),
        "ties": task_vectors("ties", base, a, b),
        "dare_ties": task_vectors("dare_ties", base, a, b),
        "slerp": slerp(a, b),
        "passthrough": windows(a, layers, half, half // 2),
        "copy": {"merge_method": "passthrough", "models": [{"model": str(a)}]},
    }


METHODS = ("linear", "ties", "dare_ties", "slerp", "passthrough", "copy")


@pytest.fixture(scope="module")
def encoders(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """Recipes for the real sentence encoder (float32, 91 MB) and two like it."""
    root = tmp_path_factory.mktemp("encoders")
    return recipes(encoder, *(models.perturbed_encoder(root / f"{seed}", seed) for seed in (1, 2)), layers=6)


@pytest.mark.parametrize("budget", ["least", "middle", "roomy"])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_of_small_models(method: str, budget: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipes(llamas["base"], llamas["a"], llamas["b"], layers=4)[method]
    least = mergeloom.plan(recipe, device="cpu").schedule.minimum_ram
    extra = {"least": 1 << 20, "middle": 32 << 20, "roomy": GIB}[budget]
    planned = with_reflinks(mergeloom.plan(recipe, device="cpu", max_ram=least + extra), tmp_path / "out")
    result = mergeloom.merge(planned, tmp_path / "out")
    said, measured = planned.to_dict(), result.to_dict()["measured"]
    for key in ("bytes_read", "bytes_written", "bytes_shared"):
        assert measured[key] == said[key], key
    assert result.measured.ram_peak <= planned.schedule.ram_slots * planned.schedule.slot_bytes
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == planned.layout.nbytes


@pytest.mark.parametrize("budget", ["least", "middle", "roomy"])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_and_memory_of_the_real_encoder(
    method: str, budget: str, encoders: dict[str, Recipe], tmp_path: Path
) -> None:
    recipe = written(tmp_path / "recipe.yml", encoders[method])
    options = ["--device", "cpu", "--threads", 2]
    least = json.loads(command("plan", recipe, tmp_path / "out", "--json", *options).stdout)["minimum_ram"]
    ram = least + {"least": 2 << 20, "middle": 32 << 20, "roomy": GIB}[budget]
    options += ["--max-ram", f"{ram}B"]
    planned = json.loads(command("plan", recipe, tmp_path / "out", "--json", *options).stdout)
    ended = command("merge", recipe, tmp_path / "out", "--quiet", "--report", tmp_path / "report.json", *options)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    measured = report["measured"]
    for key in ("bytes_read", "bytes_written", "bytes_shared"):
        assert measured[key] == report[key] == planned[key], key
    assert report["peak_ram"] <= ram
    assert measured["peak_rss"] <= report["peak_ram"]
    assert measured["excess_ram"] == 0
    assert measured["peak_rss"] >= 0.75 * report["peak_ram"] - (32 << 20)  # what is set aside, and not read ahead
    for key in ("baseline_ram", "minimum_ram", "peak_ram", "steps"):
        assert report[key] == planned[key], key


# ------------------------------------------------------------------------------------------------ system calls

CALL = re.compile(
    r"(?P<call>pread64|preadv|preadv2|pwrite64|pwritev|copy_file_range|ioctl|read|write|sendfile|mmap)\((?P<rest>.*)\)"
    r" += (?P<result>-?\d+)"
)


@dataclass
class Seen:
    """Bytes that a system call moved: of which file, from where."""

    call: str
    path: Path
    offset: int
    nbytes: int


def traced(logs: Path) -> Iterator[Seen]:
    """The calls in strace's output (with -ff -y) that move bytes of safetensors files."""
    for line in (line for log in logs.iterdir() for line in log.read_text().splitlines()):
        match = CALL.search(line)
        if match is None or ".safetensors" not in line or int(match["result"]) <= 0:
            continue
        path = re.match(r"\d+<([^>]*)>", match["rest"])
        if path is None:
            continue
        numbers = re.findall(r"(\d+)$", match["rest"])
        yield Seen(match["call"], Path(path[1]), int(numbers[0]) if numbers else 0, int(match["result"]))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace isn't installed")
@pytest.mark.parametrize("method", ["ties", "passthrough"])
def test_the_counters_are_what_the_kernel_sees(method: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    sources = {name: llamas[name] for name in ("base", "a", "b")}
    recipe = written(tmp_path / "recipe.yml", recipes(sources["base"], sources["a"], sources["b"], layers=4)[method])
    logs, out = tmp_path / "logs", tmp_path / "out"
    logs.mkdir()
    least = json.loads(command("plan", recipe, out, "--json", "--device", "cpu").stdout)["minimum_ram"]
    calls = "trace=pread64,preadv,preadv2,pwrite64,pwritev,copy_file_range,read,write,sendfile"
    ended = subprocess.run(
        [
            *("strace", "-ff", "-y", "-qq", "-s", "0", "-e", calls, "-o", str(logs / "log"), *PYTHON, "merge"),
            *(str(recipe), str(out), "--quiet", "--report", str(tmp_path / "report.json"), "--device", "cpu"),
            *("--max-ram", f"{least + (2 << 20)}B"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in ended.stderr or "Operation not permitted" in ended.stderr:
        pytest.skip("this machine doesn't allow tracing")
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    seen = list(traced(logs))
    copied = sum(call.nbytes for call in seen if call.call == "copy_file_range")
    # the engine reads with preadv; headers and the samples that identify a file are read with pread
    read = sum(call.nbytes for call in seen if call.call.startswith("preadv") and out not in call.path.parents)
    headers = {file.name: data_start(file) for file in out.glob("*.safetensors")}
    put = [call for call in seen if call.call.startswith("pwrite") and out in call.path.parents]
    data = sum(call.nbytes for call in put if call.offset >= headers[call.path.name])
    assert read + copied == report["measured"]["bytes_read"] == report["bytes_read"]
    assert data + copied == report["measured"]["bytes_written"] == report["bytes_written"]
    assert not any(call.call in ("write", "sendfile") for call in seen)
    identifying = sum(call.nbytes for call in seen if call.call in ("pread64", "read") and out not in call.path.parents)
    sizes = sum(file.stat().st_size for path in sources.values() for file in path.glob("*.safetensors"))
    assert identifying < 4 * sizes + (1 << 20)  # small files are identified by all of their bytes


def data_start(file: Path) -> int:
    """Where the data of a safetensors file begins."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


# ------------------------------------------------------------------------------------------------ too small


def test_a_budget_too_small_is_refused_with_one_that_works(llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yml", linear(llamas["a"], llamas["b"]))
    for arguments in (["plan", recipe], ["merge", recipe, tmp_path / "out"]):
        ended = command(*arguments, "--device", "cpu", "--max-ram", "20MiB")
        assert ended.returncode == 3
        assert not (tmp_path / "out").exists()
        match = re.search(r"use --max-ram (\S+) or more", ended.stderr)
        assert match is not None
        assert command(*arguments, "--device", "cpu", "--max-ram", match[1]).returncode == 0


def test_vram_too_small_is_refused_with_some_that_works(llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yml", linear(llamas["a"], llamas["b"]))
    machine = ["--for", "ram=16GiB,vram=100KiB"]
    ended = command("plan", recipe, *machine)
    assert ended.returncode == 3
    match = re.search(r"use --max-vram (\S+) or more, or --device cpu", ended.stderr)
    assert match is not None
    assert command("plan", recipe, *machine, "--max-vram", match[1]).returncode == 0
    assert command("plan", recipe, *machine, "--device", "cpu").returncode == 0


def test_a_disk_too_small_is_refused_with_what_it_takes(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergeloom import __main__

    recipe = written(tmp_path / "recipe.yml", linear(llamas["a"], llamas["b"]))
    disk = plan(linear(llamas["a"], llamas["b"])).disk
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    assert __main__.main(["plan", str(recipe), str(tmp_path / "out"), "--device", "cpu"]) == 3
    said = capsys.readouterr()
    assert data_size(disk) in said.err
    assert "1KB are free" in said.err
    assert "peak RAM" in said.out


def test_another_machine_s_memory_is_shared_out_as_it_would_be_there(llamas: dict[str, Path]) -> None:
    recipe = linear(llamas["a"], llamas["b"])
    found = plan(recipe, Options(machine=Machine(ram=100 * GIB, cores=7))).to_dict()
    assert found["max_ram"] == 70 * GIB
    assert (found["device"], found["threads"]) == ("cpu", 7)
    own = plan(recipe, Options(machine=Machine(ram=100 * GIB), max_ram=8 * GIB, threads=3)).to_dict()
    assert (own["max_ram"], own["threads"]) == (8 * GIB, 3)  # a test process that has run many tests takes a GiB
    gpu = plan(recipe, Options(machine=Machine(vram=10 * GIB), max_vram=GIB)).to_dict()
    assert (gpu["max_vram"], gpu["device"]) == (GIB, "cuda:0")
    with pytest.raises(mergeloom.UsageError, match="the machine of --for has no CUDA device"):
        plan(recipe, Options(machine=Machine(ram=GIB), device="cuda"))


def test_a_plan_for_another_machine_is_not_merged_here(llamas: dict[str, Path], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("here it could be")
    found = plan(linear(llamas["a"], llamas["b"]), Options(machine=Machine(ram=16 * GIB, vram=GIB)))
    with pytest.raises(mergeloom.UsageError, match="0 CUDA devices"):
        mergeloom.merge(found, tmp_path / "out")


def test_planning_takes_little_memory_for_one_model(make_model: MakeModel) -> None:
    path = make_model("1b", models.llama_3_2_1b(), fill=None)
    found = planned(linear(path, make_model("1b-x", models.llama_3_2_1b(), fill=None)), GIB)
    assert found["rss"] < found["plan"]["minimum_ram"]
