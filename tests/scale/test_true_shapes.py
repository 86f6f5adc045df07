"""Models of real shapes: the plan of a 122B self-merge, and the merges of the real 1B."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from tests.support.counting import count_bytes_read
from tests.support.models import FineTune, Model, Random, llama, llama_3_2_1b, llama_3_70b, write_checkpoint
from tests.support.outputs import beyond_one_ulp, config_of, read_model

GIB = 1 << 30
WEIGHTS = (0.5, 0.3, 0.2)


def seven_slices(model: Path) -> dict[str, object]:
    """The recipe of Meta-Llama-3-120B: seven slices of 20 layers, each beginning 10 later."""
    slices = [{"sources": [{"model": str(model), "layer_range": [n, n + 20]}]} for n in range(0, 70, 10)]
    return {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}


def three_models(directory: Path, model: Model, shard_bytes: int | None = None) -> list[Path]:
    """Write a base model and two fine-tunes."""
    base = Random(0)
    fills = (base, FineTune(base, 1), FineTune(base, 2))
    return [
        write_checkpoint(directory / f"m{n}", model, shard_bytes=shard_bytes, fill=fill) for n, fill in enumerate(fills)
    ]


def linear(models: list[Path]) -> dict[str, object]:
    """Their weighted mean."""
    listed = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, WEIGHTS, strict=True)]
    return {"merge_method": "linear", "models": listed}


def test_the_120b_self_merge_is_planned_from_headers_alone(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "70B", llama_3_70b(), shard_bytes=5 * 10**9, fill=None)
    assert sum(file.stat().st_blocks * 512 for file in model.iterdir()) < 10 << 20  # holes
    recipe = seven_slices(model)
    planned = plan(recipe, Options(device="cpu"))  # imports what it needs
    headers = sum(header_bytes(file) for file in model.glob("*.safetensors"))
    others = sum(file.stat().st_size for file in model.glob("*.json"))
    assert headers <= count_bytes_read(lambda: plan(recipe, Options(device="cpu"))) <= headers + 3 * others + (1 << 20)
    said = planned.to_dict()
    assert said["output"]["layers"] == 140
    assert said["output"]["parameters"] == 121_892_970_496
    assert said["output"]["bytes"] == said["bytes_written"] == 2 * 121_892_970_496
    assert said["bytes_read"] == 2 * 70_553_706_496
    assert not planned.computes
    assert planned.built.unused == ()
    assert all(shard.nbytes <= 5 * 10**9 for shard in planned.layout.shards)


def test_a_new_process_plans_it_without_torch(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "70B", llama_3_70b(), shard_bytes=5 * 10**9, fill=None)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(seven_slices(model)))
    code = "import sys; from mergeloom.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "plan", str(recipe), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["output"]["parameters"] == 121_892_970_496


def test_one_matrix_of_a_1b_is_float64s_mean(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    models = three_models(tmp_path, Model({name: llama_3_2_1b().tensors[name]}, {}))
    merge(linear(models), tmp_path / "out", Options(device="cpu", threads=2, max_ram=2 * GIB))
    found = read_model(tmp_path / "out")[name][::8]
    assert beyond_one_ulp(found, [read_model(model)[name][::8] for model in models], WEIGHTS) == 0


@pytest.mark.slow
def test_models_larger_than_the_budget_are_float64s_mean(tmp_path: Path) -> None:
    shapes = llama(layers=4, hidden=1024, intermediate=4096, heads=32, kv_heads=8, vocabulary=32064, tied=True)
    models = three_models(tmp_path, shapes, shard_bytes=100_000_000)
    assert len(list(models[0].glob("*.safetensors"))) == 2
    recipe, out, report = tmp_path / "recipe.yml", tmp_path / "out", tmp_path / "report.json"
    recipe.write_text(json.dumps(linear(models)))
    command = [sys.executable, "-m", "mergeloom", "merge", str(recipe), str(out)]
    options = ["--max-ram", "384MiB", "--device", "cpu", "--shard-size", "100MB", "--report", str(report), "--quiet"]
    subprocess.run([*command, *options], check=True)
    said = json.loads(report.read_text())
    assert said["measured"]["peak_rss"] < said["peak_ram"] <= 384 << 20 < said["bytes_read"]
    assert said["measured"]["bytes_read"] == said["bytes_read"] == 3 * 2 * shapes.parameters
    assert len(list(out.glob("*.safetensors"))) == said["output"]["shards"] == 2
    assert config_of(out)["tie_word_embeddings"] is True
    inputs = [{name: file for file in model.glob("*.safetensors") for name in names(file)} for model in models]
    count = 0
    for file in out.glob("*.safetensors"):
        for name in names(file):
            sources = [tensor(homes[name], name) for homes in inputs]
            step = max(1, (1 << 17) // sources[0][0].numel())
            found = tensor(file, name)
            for row in {*range(0, len(found), 16 * step), len(found) - step}:  # all would take minutes
                part = slice(row, row + step)
                assert beyond_one_ulp(found[part], [source[part] for source in sources], WEIGHTS) == 0, name
            count += 1
    assert count == len(shapes.tensors)
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def header_bytes(file: Path) -> int:
    """The size of a file's header, with the eight bytes that say so."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def names(file: Path) -> list[str]:
    """The tensors of a file."""
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file."""
    with safe_open(file, framework="pt") as opened:
        found: Tensor = opened.get_tensor(name)
        return found
