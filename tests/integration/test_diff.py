"""`mergeloom diff`: its output, options, exit codes and imports, on models, Hub ids and the output of a merge."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import mergeloom
from mergeloom.cli.app import cli
from mergeloom.errors import CheckpointError
from tests.conftest import MakeModel
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.paths import ROOT
from tests.support.plans import linear
from tests.unit.diff.parts import make
from tests.unit.report.pages import Page

COMMAND = [sys.executable, "-m", "mergeloom", "diff"]


def diff(*arguments: object) -> Result:
    """Run the command in this process."""
    result = CliRunner().invoke(cli, ["diff", *map(str, arguments)])
    assert result.exit_code == 0, result.exception
    return result


def spawn(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def values(model: Path) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """All tensors of a model in float64, flat."""
    tensors = {name: value for file in model.glob("*.safetensors") for name, value in load_file(file).items()}
    return {name: value.double().flatten().numpy() for name, value in tensors.items()}


def test_tables_go_to_stdout(llamas: dict[str, Path]) -> None:
    result = diff(llamas["base"], llamas["a"], "--quiet")
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    for text in ("different, 38 tensors compared", "relative distance", "model.layers.3", "outside the layers"):
        assert text in result.stdout
    assert "model.layers.*.mlp.up_proj.weight" in result.stdout
    assert "model.layers.2.mlp.up_proj.weight" not in result.stdout
    assert "model.layers.2.mlp.up_proj.weight" in diff(llamas["base"], llamas["a"], "--tensors").stdout


def test_json_matches_float64_references(llamas: dict[str, Path]) -> None:
    found = json.loads(diff(llamas["base"], llamas["a"], "--json").stdout)
    a, b = values(llamas["base"]), values(llamas["a"])
    assert {tensor["name"] for tensor in found["tensors"]} == a.keys()
    groups = [([name], tensor) for tensor in found["tensors"] if (name := tensor["name"])]
    groups += [([n for n in a if n.startswith(f"model.layers.{k}.")], found["layers"][k]) for k in range(4)]
    groups += [([n for n in a if re.sub(r"\d+", "*", n) == kind["kind"]], kind) for kind in found["kinds"]]
    groups.append((list(a), found["total"]))
    for names, measured in groups:
        x, y = (np.concatenate([model[name] for name in names]) for model in (a, b))
        assert math.isclose(measured["relative_distance"], np.linalg.norm(x - y) / np.linalg.norm(x), rel_tol=1e-12)
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        assert math.isclose(measured["cosine"], cosine, rel_tol=1e-12)
        assert measured["equal"] == np.mean(x == y)
        assert measured["elements"] == x.size
    assert found["bytes_read"] == 2 * 2 * sum(x.size for x in a.values())
    assert found.keys() == {
        *("a", "b", "total", "layers", "kinds", "tensors", "only_in_a", "only_in_b", "not_compared", "warnings"),
        *("bytes_read", "max_ram", "peak_ram", "peak_rss"),
    }


def test_json_has_null_for_what_is_undefined(make_model: MakeModel) -> None:
    a, b = make_model("a", {"w": (2, 2)}, fill=None), make_model("b", {"w": (2, 2)})
    result = diff(a, b, "--json")
    assert "NaN" not in result.stdout
    (tensor,) = json.loads(result.stdout)["tensors"]
    assert (tensor["relative_distance"], tensor["cosine"], tensor["equal"]) == (None, None, 0.0)


def test_the_output_of_a_merge_is_a_model(llamas: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    mergeloom.merge(linear(llamas["a"], llamas["a"]), out, device="cpu")
    assert "equal, 38 tensors compared" in diff(llamas["a"], out).stdout
    assert mergeloom.diff(out, llamas["b"]).total.relative_distance == pytest.approx(
        mergeloom.diff(llamas["a"], llamas["b"]).total.relative_distance
    )


def test_html_is_written_and_only_replaces_its_own_file(llamas: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "diff.html"
    for other in ("a", "b"):
        diff(llamas["base"], llamas[other], "--html", page)
        assert f"{llamas[other]} (B)" in Page(page.read_text()).text
    page.write_text("mine")
    ended = spawn(llamas["base"], llamas["a"], "--html", page)
    assert ended.returncode == 2
    assert "exists and was not written by mergeloom" in ended.stderr
    assert page.read_text() == "mine"


def test_warnings_go_to_stderr(make_model: MakeModel) -> None:
    a, b = (make_model(name, {"w": (2, 2)}) for name in "ab")
    with (a / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\xc0\x7f")  # NaN
    result = diff(a, b)
    text = "NaN or infinite in A or B, and left out of distances and cosines: 1 element of 1 tensor, first in w"
    assert result.stderr == f"warning: {text}\n"


# ------------------------------------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{a}", "{a}-missing"), 4, "there is no such directory or file"),
        (("{a}", "{quantized}d"), 2, "quantizedd here; did you mean `{quantized}`?"),
        (("{a}", "{a}+adapter"), 4, "adapter: there is no such directory"),
        (("{a}", "{quantized}"), 4, "is quantized"),
        (("{a}",), 2, "Missing argument 'B'"),
        (("{a}", "{a}", "--threads", "0"), 2, "--threads"),
        (("{a}", "{a}", "--max-ram", "much"), 2, "invalid size 'much'"),
        (("{a}", "{a}", "--html", "/nowhere/x.html"), 2, "there is no directory"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], code: int, message: str, make_model: MakeModel) -> None:
    shapes = {"w": (2, 2), "w_scale": (1,)}
    paths = {"a": make_model("a", {"w": (2, 2)}), "quantized": make_model("quantized", shapes)}
    ended = spawn(*(argument.format(**paths) for argument in arguments))
    assert (ended.returncode, ended.stdout) == (code, "")
    assert message.format(**paths) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_smallest_budget_that_a_message_names_works(tmp_path: Path) -> None:
    model = tiny_llama(hidden=512, vocabulary=8192)
    paths = [write_checkpoint(tmp_path / name, model, fill=seed) for seed, name in enumerate("ab")]
    refused = spawn(*paths, "--json", "--max-ram", "1MiB")
    assert refused.returncode == 3
    match = re.search(r"use --max-ram ([\d.]+MiB) or more", refused.stderr)
    assert match is not None, refused.stderr
    ended = spawn(*paths, "--max-ram", match[1], "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["peak_rss"] <= found["peak_ram"] <= found["max_ram"] <= 128 << 20
    assert found["bytes_read"] == 2 * 2 * model.parameters


def test_decoding_stays_within_the_smallest_budget(tmp_path: Path) -> None:
    code = (
        "import sys; from mergeloom.engine.model.formats import registry;"
        "from tests.unit.diff.parts import find;"
        "registry.FORMATS['test'] = find; from mergeloom.__main__ import main; main(sys.argv[1:])"
    )
    stored, values = make(1)
    paths = [write_checkpoint(tmp_path / name, made) for name, made in (("parts", stored), ("values", values))]
    command = [sys.executable, "-c", code, "diff", *map(str, paths), "--json", "--max-ram"]
    refused = subprocess.run([*command, "1MiB"], capture_output=True, text=True, check=False, cwd=ROOT)
    match = re.search(r"use --max-ram ([\d.]+MiB) or more", refused.stderr)
    assert match is not None, refused.stderr
    ended = subprocess.run([*command, match[1]], capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert all(tensor["equal"] == 1 for tensor in found["tensors"])
    assert found["peak_rss"] <= found["peak_ram"] <= found["max_ram"]


def test_a_comparison_loads_no_torch(llamas: dict[str, Path], tmp_path: Path) -> None:
    code = "import sys; from mergeloom.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    arguments = ["diff", llamas["base"], llamas["a"], "--html", tmp_path / "x.html"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True)


def test_an_unfinished_merge_is_not_a_model(llamas: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out" / ".mergeloom").mkdir(parents=True)
    with pytest.raises(CheckpointError):
        mergeloom.diff(llamas["a"], tmp_path / "out")
