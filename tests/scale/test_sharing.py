"""Published stacks of 70B and 405B at their full size, from sparse checkpoints, and a larger one full of data."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.passthrough import WINDOWS, make_sparse
from mergeloom.engine.run.merge import merge
from tests.support.disks import file_system, used
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.outputs import read_model, same_tensors
from tests.support.plans import sliced
from tests.support.stacks import ROOMY, as_planned
from tests.support.waiting import HANG_SECONDS


def write_some(model: Path, names: list[str], seed: int = 5) -> None:
    """Put random bytes into some tensors of a sparse checkpoint."""
    import numpy as np

    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    for number, name in enumerate(names):
        with (model / index[name]).open("r+b") as stream:
            size = int.from_bytes(stream.read(8), "little")
            begin, end = json.loads(stream.read(size))[name]["data_offsets"]
            stream.seek(8 + size + begin)
            stream.write(np.random.default_rng([seed, number]).bytes(end - begin))


def tensor_bytes(model: Path, name: str) -> bytes:
    """A tensor's bytes, by nothing but the format."""
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    with (model / index[name]).open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        begin, end = json.loads(stream.read(size))[name]["data_offsets"]
        stream.seek(8 + size + begin)
        return stream.read(end - begin)


@pytest.mark.root
@pytest.mark.slow
def test_published_stacks_at_full_size(tmp_path: Path) -> None:
    """120B from 70B, 681B from 405B, 1T from that and in one go: hardly any disk space, and hardly any bytes copied."""
    with file_system(tmp_path, "xfs", nbytes=6 << 30) as disk:
        make_sparse(disk)
        filled = [
            f"model.layers.{layer}.{part}.weight"
            for layer in (0, 41, 60, 125)
            for part in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm", "post_attention_layernorm")
        ]
        write_some(disk / "405B", filled)
        write_some(disk / "70B", names70 := [name for name in filled if ".125." not in name and ".41." not in name])
        sources = digests_of_some(disk)
        recipes = {
            name: sliced(*((disk / source, *part) for part in parts)) for name, (source, parts) in WINDOWS.items()
        }
        fused = [{**recipes["681B"], "name": "681B"}, recipes["1T"]]
        origin = {layer: layer for layer in range(126)}
        layers = {"405B": origin, "70B": {layer: layer for layer in range(80)}}
        for name, recipe in {**recipes, "1T fused": None}.items():
            before = used(disk)
            file = tmp_path / "recipe.yml"
            texts = fused if recipe is None else [recipe]
            text = "\n---\n".join(json.dumps({"dtype": "bfloat16", **each}) for each in texts)
            file.write_text(text.replace(str(disk / "681B"), "681B") if recipe is None else text)
            command = [sys.executable, "-m", "mergeloom", "merge", str(file), str(disk / name), "--quiet"]
            report = tmp_path / "report.json"
            if name == "1T":
                kill_half_way(command[3:], disk / name)
            subprocess.run([*command, "--report", str(report)], check=True, timeout=HANG_SECONDS)
            found = json.loads(report.read_text())
            assert found["measured"]["bytes_shared"] == found["bytes_shared"]
            assert found["measured"]["bytes_written"] - found["bytes_shared"] < found["output"]["bytes"] // 1000
            assert found["measured"]["peak_rss"] <= found["peak_ram"]
            assert used(disk) - before < found["output"]["bytes"] // 100
            source, parts = WINDOWS[name.removesuffix(" fused")]
            layers[name] = {
                n: layers[source][layer] for n, layer in enumerate(x for a, b in parts for x in range(a, b))
            }
            parent = disk / ("70B" if name == "120B" else "405B")
            checked = 0
            for target, layer in layers[name].items():
                for wanted in (n for n in (names70 if name == "120B" else filled) if f".{layer}." in n):
                    ours = tensor_bytes(disk / name, wanted.replace(f".{layer}.", f".{target}."))
                    assert ours == tensor_bytes(parent, wanted)
                    checked += 1
            assert checked >= 8
        assert digests_of_some(disk) == sources


BLOCKED = """
import os, sys, threading
from mergeloom.__main__ import main
from mergeloom.io import platform

left = 20
lock = threading.Lock()

def watch(call, *arguments):
    global left
    if call == "clone":
        with lock:
            left -= 1
            if left < 0:
                os.write(1, b"blocked\\n")
                threading.Event().wait()

platform.WATCH = watch
main(sys.argv[1:])
"""
"""A merge that blocks after a number of ranges have been shared."""


def kill_half_way(arguments: list[str], out: Path) -> None:
    """Begin a merge, and kill it while blocks are being shared."""
    process = subprocess.Popen([sys.executable, "-c", BLOCKED, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"blocked\n"
    process.kill()
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == -signal.SIGKILL
    assert not (out / "mergeloom.json").exists()


def digests_of_some(disk: Path) -> list[tuple[str, int, int, bytes]]:
    """Sizes, times and first bytes of the source files, which are too large to be read completely."""
    files = sorted(file for name in ("70B", "405B") for file in (disk / name).iterdir())
    found = []
    for file in files:
        with file.open("rb") as stream:
            stat = file.stat()
            found.append((str(file), stat.st_size, stat.st_mtime_ns, stream.read(1 << 16)))
    return found


@pytest.mark.root
@pytest.mark.slow
def test_a_larger_model_full_of_data(tmp_path: Path) -> None:
    with file_system(tmp_path, "xfs", nbytes=6 << 30) as disk:
        shapes = tiny_llama(layers=12, hidden=2048, vocabulary=32000)
        model = write_checkpoint(disk / "a", shapes, fill=9, shard_bytes=400_000_000)
        recipe = sliced((model, 0, 8), (model, 4, 12))
        before = used(disk)
        result = merge(recipe, disk / "out", ROOMY)
        as_planned(result)
        assert used(disk) - before < result.plan.layout.nbytes // 100
        source, found = read_model(model), read_model(disk / "out")
        expected = {name: tensor for name, tensor in source.items() if ".layers." not in name}
        for target, layer in enumerate([*range(8), *range(4, 12)]):
            old, new = f"model.layers.{layer}.", f"model.layers.{target}."
            expected |= {new + name.removeprefix(old): x for name, x in source.items() if name.startswith(old)}
        assert same_tensors(found, expected)
