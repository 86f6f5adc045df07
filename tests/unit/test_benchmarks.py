"""The benchmarks measure what they say: memory and time of known programs, the bytes of the floor, the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from benchmarks import bars, budgets, compare, floor, gpu, passthrough, picture, process, scaling, tables
from benchmarks.compute import rounding
from benchmarks.giants import adapters, fp8
from tests.support import models

MEASURE = """
import json, sys
from benchmarks import process
measured = process.run([sys.executable, "-c", sys.argv[1]])
print(json.dumps([measured.seconds, measured.peak_rss]))
"""


def measure(program: str) -> tuple[float, int]:
    """Seconds and peak RSS of a Python program, measured from a process of its own, as small as process.py is."""
    command = [sys.executable, "-c", MEASURE, program]
    found = subprocess.run(command, cwd=compare.HERE.parent, capture_output=True, text=True, check=True)
    seconds, peak_rss = json.loads(found.stdout)
    return seconds, peak_rss


def test_peak_rss_is_that_of_the_process() -> None:
    _, idle = measure("pass")
    _, held = measure("b = bytearray(300 << 20); b[::4096] = b'x' * len(b[::4096]); del b")
    assert idle < 40 << 20
    assert 300 << 20 < held < 345 << 20


def test_seconds_are_those_of_the_whole_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The clock is read before the process starts, and once after its last act and after the sync."""
    witness = tmp_path / "witness"
    synced: list[Path] = []
    readings: list[tuple[bool, list[Path]]] = []

    def clock() -> float:
        readings.append((witness.exists(), list(synced)))
        return 10.0 * len(readings)

    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(process, "sync", synced.append)
    measured = process.run([sys.executable, "-S", "-c", f"open({str(witness)!r}, 'w')"], durable=tmp_path)
    assert readings == [(False, []), (True, [tmp_path])]
    assert measured.seconds == 10


def test_a_failed_process_shows_its_log() -> None:
    with pytest.raises(process.ProcessError, match=r"ended with 3:\n.*so it was"):
        process.run([sys.executable, "-c", "import sys; print('so it was'); sys.exit(3)"])


def test_the_floor_writes_as_many_bytes_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(bytes(3 * floor.PIECE + 5))
    files = [str(tmp_path / "out"), "5500000", "2", str(tmp_path / "input"), str(tmp_path / "input")]
    command = [sys.executable, "-S", "-E", floor.__file__, *files]
    printed = subprocess.run(command, capture_output=True, check=True).stdout
    assert set(json.loads(printed)) == {"seconds"}
    assert (tmp_path / "out/output").stat().st_size == 5_500_000


def test_the_floor_reads_and_writes_every_byte_once() -> None:
    sizes, output = [3 * floor.PIECE + 5, 1, 0], 2 * floor.PIECE
    found = list(floor.pieces(sizes, output))
    for file, size in (*enumerate(sizes), (-1, output)):
        parts = [(offset, count) for number, offset, count in found if number == file]
        assert [offset for offset, _ in parts] == list(range(0, size, floor.PIECE))
        assert sum(count for _, count in parts) == size


@pytest.mark.parametrize("method", compare.CASES)
def test_recipes_name_what_they_read(method: str) -> None:
    case = compare.CASES[method]
    recipe = yaml.safe_load(case.text(method, Path("/models")))
    named = {entry["model"] for entry in recipe["models"]} | {recipe.get("base_model", recipe["models"][0]["model"])}
    assert named == {f"/models/{name}" for name in case.inputs.split()}
    assert recipe["merge_method"] == method


def test_the_table_has_medians_and_their_ratio(tmp_path: Path) -> None:
    seconds = {"mergeloom": (2.0, 1.0, 3.0), "mergekit": (9.0, 10.0, 30.0), "floor": (1.0, 1.0, 1.0)}
    runs = [
        {"method": "ties", "side": side, "seconds": value, "peak_rss": 2**30, "others_cpu_seconds": value / 4}
        for side, values in seconds.items()
        for value in values
    ]
    flags = {"mergekit_flags": "", "mergeloom_flags": "--max-ram 1GiB"}
    results = {"title": "T", "versions": {"mergekit": "0.1.5"}, **flags, "runs": runs}
    text = tables.table(results | {"machine": process.machine()})
    row = "| `ties` | 2.00 (1.00 to 3.00) | 10.00 (9.00 to 30.00) | 1.00 (1.00 to 1.00) | 5.0 | 2.00 | 1.00 | 1.00 |"
    assert row in text
    assert "mergeloom ran with `--max-ram 1GiB`, mergekit with its default flags. In 9 of 9 runs" in text
    document = tmp_path / "docs/benchmarks.md"
    for content in ("old", text):
        tables.put_between_markers(document, "here", content)
    assert document.read_text().count("<!-- here -->") == 1
    assert "old" not in document.read_text()
    assert text in document.read_text()


# ---------------------------------------------------------------------------------------------- passthrough


def test_the_stacks_are_the_published_ones() -> None:
    from mergeloom.engine.recipe.load import parse_recipe
    from mergeloom.methods import merge_methods

    recipes = Path(compare.HERE.parent / "recipes")
    published = {
        "120B": "Meta-Llama-3-120B-Instruct",
        "681B": "BigLlama-3.1-681B-Instruct",
        "1T": "BigLlama-3.1-1T-Instruct",
    }
    for name, file in published.items():
        text = passthrough.stage("/models/source", passthrough.WINDOWS[name][1])
        parse_recipe(text, strict=True, methods=merge_methods())
        theirs = yaml.safe_load((recipes / f"{file}.yml").read_text())["slices"]
        ours = yaml.safe_load(text)["slices"]
        layers = [[each["sources"][0]["layer_range"] for each in slices] for slices in (ours, theirs)]
        assert layers[0] == layers[1]


def test_the_merge_and_cp_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.write_checkpoint(tmp_path / "base", models.tiny_llama(), fill=1)
    monkeypatch.setattr(passthrough, "STACK", [(0, 3), (1, 4)])
    found = passthrough.compare_with_cp(model, tmp_path, tmp_path, 1, 0)
    assert found["bytes"] > 100_000
    assert all(len(seconds) == 1 for seconds in found["seconds"].values())
    assert "times. Medians of 1, alternating" in passthrough.cp_text(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "stack.yml"]


def test_the_table_of_sparse_stacks() -> None:
    row = {"merge": "1T", "seconds": 2.34, "peak_rss": 60 << 20, "bytes": 2 * 10**12, "disk": 13 * 10**6}
    assert "| 1T | 2,000 GB | 2.3 | 13 MB | 60 MiB |" in passthrough.sparse_text([row])


# ---------------------------------------------------------------------------------------------- budgets


def test_budgets_of_small_models(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b", "c")):
        models.write_checkpoint(tmp_path / name, models.tiny_llama(), fill=seed)
    rows = [budgets.measure("ties", budget, tmp_path, tmp_path / "out", tmp_path) for budget in ("512MiB", "2GiB")]
    assert budgets.broken(rows) == []
    assert not (tmp_path / "out").exists()
    assert rows[0]["foretold"]["bytes_read"] > 100_000
    text = budgets.text({"machine": process.machine(), "rows": rows})
    assert "| `ties` | 512MiB |" in text
    assert "No process exceeds its planned peak" in text


def test_broken_budgets_are_said() -> None:
    counted = {"bytes_read": 1, "bytes_written": 1, "bytes_shared": 0}
    row = {"method": "ties", "budget": "1GiB", "max_ram": 30, "peak_ram": 20, "peak_rss": 10, "digest": "x"}
    row |= {"foretold": counted, "measured": counted}
    assert budgets.broken([row, row]) == []
    for change, said in (
        ({"peak_rss": 21}, "21 of 20 of 30 bytes"),
        ({"peak_ram": 31}, "10 of 31 of 30 bytes"),
        ({"digest": "y"}, "other budgets give other bytes"),
        ({"measured": counted | {"bytes_read": 2}}, "planned {"),
    ):
        (found,) = budgets.broken([row, row | change])
        assert said in found


# ---------------------------------------------------------------------------------------------- scaling and bars


def test_a_point_of_each_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("base", "a", "b", "c")):
        models.write_checkpoint(tmp_path / name, models.tiny_llama(), fill=seed)
    monkeypatch.setattr(scaling, "PLANNED", ((2, 8),))
    monkeypatch.setattr(scaling, "WIDTHS", (64, 16, 64))
    monkeypatch.setattr(scaling, "SMALL_WIDTHS", (64, 16, 64))
    monkeypatch.setattr(scaling, "SPLIT", (4,))
    monkeypatch.setattr(scaling, "SPLIT_BYTES", 1 << 20)
    rows = []
    for part, (points, _) in scaling.PARTS.items():
        (tmp_path / part).mkdir()
        point = next(iter(points(tmp_path, tmp_path / part)))
        rows.append(scaling.measure(point, 1, 0, 0, tmp_path / "out"))
        assert rows[-1]["seconds"][0] > 0
    assert not (tmp_path / "out").exists()
    text = scaling.text({"machine": process.machine(), "rows": rows})
    assert "| 69 | `linear of two models` | " in text
    assert "| 69 | `merge --no-output` | " in text
    assert "medians of 1 (smallest to largest)" in text
    found = [bar.what for bar in bars.of_scaling({"rows": rows})]
    assert found == ["`mergeloom --help`", "plan of 69 tensors", "peak RSS of the plan of 69 tensors"]


def test_bars_are_met_or_missed() -> None:
    def run(method: str, side: str, seconds: float, peak: int = 2**29) -> dict[str, object]:
        return {"method": method, "side": side, "seconds": seconds, "peak_rss": peak}

    runs = [run("linear", "mergeloom", 3.3, 2**27), run("linear", "mergekit", 20.0), run("linear", "floor", 2.0)]
    runs += [run("ties", "mergeloom", 10.0, 2**30 + 1), run("ties", "mergekit", 299.0)]
    found = {bar.what: bar.met for bar in bars.of_comparison({"runs": runs})}
    assert found == {
        "`linear` vs. mergekit": True,
        "`linear` vs. reading and writing": False,
        "peak RSS of `linear`": True,
        "`ties` vs. mergekit": False,
        "peak RSS of `ties`": False,
    }
    (bar,) = bars.of_scaling({"rows": [{"part": "start", "label": "mergeloom plan", "seconds": [2.0, 1.0, 1.2]}]})
    assert "| `mergeloom plan` | under 1.5 s | 1.20 s | met |" in bars.text([bar])


# ---------------------------------------------------------------------------------------------- gpu


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "gpu_name", lambda: None)
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out == "There is no CUDA GPU here: nothing was measured.\n"


def test_merges_for_the_gpu_table(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b", "c")):
        models.write_checkpoint(tmp_path / name, models.tiny_llama(), fill=seed)
    bench = gpu.Bench(
        models=tmp_path,
        work=tmp_path,
        out=tmp_path / "out",
        on_disk=False,
        cold=False,
        memory=0,
        quiet=0,
        mergekit=tmp_path,
        first=tmp_path,
        threads=1,
        mergekit_flags=(),
        mergeloom_flags=(),
    )
    row = gpu.measure(bench, "slerp", ["--device", "cpu"])
    assert row["bytes_read"] > 100_000
    assert (row["max_vram"], row["peak_vram"]) == (0, 0)
    on_gpu = row | {"options": "--max-vram 2GiB", "max_vram": 2**31, "peak_vram": 2**30, "seconds": 2.0}
    results = {"rows": [row, on_gpu], "machine": process.machine(), "gpu": "G", "size": "8B", "copy_rate": 5e10}
    text = gpu.text(results | {"mergekit": {"slerp": 50.0}})
    assert "No budget was exceeded" in text
    assert "| mergekit `--cuda` | 50.0 | | | | 25.0 times our time |" in text
    (over,) = gpu.broken({"rows": [row, on_gpu | {"peak_vram": 2**31 + 1}]})
    assert "2,147,483,649 bytes of VRAM, of 2,147,483,648" in over
    assert len(gpu.broken({"rows": [row, on_gpu | {"digest": ""}]})) == 2


# ---------------------------------------------------------------------------------------------- pictures


def test_a_screen_holds_what_was_drawn_half_way_and_last() -> None:
    written = "headline\r\n\x1b[?25l\r  0%\x1b[K\r 50%\x1b[K\r 99%\x1b[K\r\x1b[KMerged\x1b[?25h\r\n  time\r\n"
    assert picture.screen(written) == ["headline", " 99%", "Merged", "  time", ""]


def test_a_command_on_a_terminal(tmp_path: Path) -> None:
    program = "import os, sys; print(sys.stdout.isatty(), os.get_terminal_size().columns, os.getcwd())"
    said = picture.on_terminal([sys.executable, "-c", program], tmp_path)
    assert said.split() == ["True", str(picture.COLUMNS), str(tmp_path)]
    with pytest.raises(SystemExit, match="ended with 3"):
        picture.on_terminal([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


# ---------------------------------------------------------------------------------------------- 671B in FP8


def test_one_layer_has_the_tensors_of_a_layer_of_experts() -> None:
    layer, complete = fp8.one_layer(), models.deepseek_v3()
    tensors, place = layer.tensors, "model.layers.7."
    assert tensors == {
        name.replace(place, "model.layers.0."): shape
        for name, shape in complete.tensors.items()
        if name.startswith(place)
    }
    assert {name: layer.dtypes.get(name) for name in tensors} == {
        name: complete.dtypes.get(name.replace("model.layers.0.", place)) for name in tensors
    }


def test_a_filled_model_has_random_codes_and_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(fp8, "_POOL", 1 << 18)
    monkeypatch.setattr(fp8, "_PIECE", 1 << 16)
    shapes = {"weight": (384, 512), "weight_scale_inv": (3, 4), "norm": (512,)}
    dtypes = {"weight": "F8_E4M3", "weight_scale_inv": "F32"}
    model = models.Model(
        {f"layers.{n}.{name}": shape for n in range(3) for name, shape in shapes.items()},
        {},
        {f"layers.{n}.{name}": dtype for n in range(3) for name, dtype in dtypes.items()},
    )
    found = []
    for seed in range(2):
        path = models.write_checkpoint(tmp_path / str(seed), model, fill=None, shard_bytes=300_000)
        fp8.fill(path, seed)
        found.append({name: each for shard in process.shards(path) for name, each in load_file(shard).items()})
    for name, value in found[0].items():
        assert torch.isfinite(value.float()).all()
        assert value.float().abs().amin() < value.float().abs().amax()
        assert not torch.equal(value.float(), found[1][name].float())
        assert not name.endswith("scale_inv") or value.amin() > 0


def test_a_filled_base_has_random_values_up_to_its_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(adapters, "_PIECE", 1 << 10)
    model = models.llama(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=128)
    path = models.write_checkpoint(tmp_path / "base", model, fill=None)
    adapters.fill(process.shards(path))
    found = [tensor.float() for shard in process.shards(path) for tensor in load_file(shard).values()]
    assert len(found) == len(model.tensors)
    assert all(tensor.abs().max() > 0 and torch.isfinite(tensor).all() for tensor in found)


# ---------------------------------------------------------------------------------------------- rounding


def test_the_share_of_an_update_that_survives() -> None:
    """Half of the update, and a change of the same length across it."""
    before, update = torch.zeros(4), torch.tensor([3.0, 0.0, 0.0, 4.0])
    across = torch.tensor([0.0, 5.0, 0.0, 0.0])
    found = rounding.survival({"w": before}, {"w": update}, {"w": update / 2 + across})
    assert found == pytest.approx((0.5, 1.0))
    assert rounding.survival({"w": before}, {"w": update}, {"w": update}) == (1.0, 0.0)


def test_rounding_of_a_small_matrix() -> None:
    """What merges store is compared with torch's casts on the way; small updates disappear first."""
    weights = {"model.layers.0.mlp.up_proj.weight": torch.randn(256, 256, generator=torch.Generator().manual_seed(1))}
    config = {"model_type": "llama", "num_hidden_layers": 1}
    for form, smallest in (("bfloat16", 0.4), ("fp8_blocks", 0.0)):
        small, large = rounding.measure(weights, rounding.by_merges(form, config), (0.001, 0.1), seed=0)
        assert smallest < small.share < 0.7
        assert 0.95 < large.share < 1.05
        assert large.noise < small.noise < 1
    for form in ("INT4", "MXFP4"):
        small, large = rounding.measure(weights, rounding.by_library(form), (0.001, 0.1), seed=0)
        assert small.share < 0.1 < 0.5 < large.share < 0.9
