"""Merges from end to end: the output has the values that the recipe asks for, and other tools load it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.errors import CheckpointError
from tests.conftest import MakeModel
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.outputs import beyond_one_ulp, config_of, digests, read_model, same_bits, same_tensors
from tests.support.plans import ROOMY, sliced, weighted_mean, weighted_slices

SENTENCES = ["A man is playing a guitar on stage.", "The stock market fell sharply today."]


def loaded(directory: Path, kind: str = "AutoModel") -> Any:
    """A model as transformers loads it: nothing missing, nothing left over."""
    model, info = getattr(transformers, kind).from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    return model.eval()


def embeddings(directory: Path, model: Any) -> Tensor:
    """What a sentence encoder makes of the sentences: the mean over the tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden: Tensor = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


# ------------------------------------------------------------------------------------------------ passed through


def test_all_layers_passed_through_are_the_encoder(encoder: Path, tmp_path: Path) -> None:
    result = merge(sliced((encoder, 0, 6)), tmp_path / "out", ROOMY)
    assert same_tensors(read_model(tmp_path / "out"), read_model(encoder))
    expected, found = (embeddings(path, loaded(path)) for path in (encoder, tmp_path / "out"))
    assert same_bits(found, expected)
    said = result.to_dict()
    for key in ("bytes_read", "bytes_written", "bytes_shared"):
        assert said["measured"][key] == said[key]
    assert said["bytes_written"] + said["bytes_shared"] == said["inputs"]["bytes"]


def test_stacked_layers_are_a_model_stacked_by_hand(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(sliced((encoder, 0, 4), (encoder, 2, 6)), out, ROOMY)
    assert config_of(out)["num_hidden_layers"] == 8
    source = transformers.AutoModel.from_pretrained(encoder)
    by_hand = transformers.AutoModel.from_config(
        transformers.AutoConfig.from_pretrained(encoder, num_hidden_layers=8)
    ).eval()
    by_hand.embeddings.load_state_dict(source.embeddings.state_dict())
    by_hand.pooler.load_state_dict(source.pooler.state_dict())
    for target, layer in enumerate((0, 1, 2, 3, 2, 3, 4, 5)):
        by_hand.encoder.layer[target].load_state_dict(source.encoder.layer[layer].state_dict())
    assert same_bits(embeddings(out, loaded(out)), embeddings(encoder, by_hand))


def test_a_stack_of_llamas_runs_as_its_layers_do(llamas: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(sliced((llamas["a"], 0, 3), (llamas["b"], 1, 4)), out, ROOMY)
    found, a, b = read_model(out), read_model(llamas["a"]), read_model(llamas["b"])
    sources = [(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]
    expected = {
        "model.embed_tokens.weight": a["model.embed_tokens.weight"],
        "model.norm.weight": b["model.norm.weight"],
    }
    for layer, (model, number) in enumerate(sources):
        prefix = f"model.layers.{number}."
        expected |= {f"model.layers.{layer}.{n[len(prefix) :]}": x for n, x in model.items() if n.startswith(prefix)}
    assert same_tensors(found, expected)
    model = loaded(out, "AutoModelForCausalLM")
    with torch.inference_mode():
        logits = model(torch.arange(8).view(1, 8)).logits
    assert logits.shape == (1, 8, 64)
    assert torch.isfinite(logits).all()


def test_scaled_tensors(llamas: dict[str, Path], tmp_path: Path) -> None:
    scale = [{"filter": "down_proj", "value": 0}, {"filter": "q_proj", "value": -0.5}, {"value": 1}]
    merge(sliced((llamas["a"], 0, 4), parameters={"scale": scale}), tmp_path / "out", ROOMY)
    found = read_model(tmp_path / "out")
    for name, tensor in read_model(llamas["a"]).items():
        factor = 0.0 if "down_proj" in name else -0.5 if "q_proj" in name else 1.0
        assert torch.equal(found[name], tensor * factor), name


# ------------------------------------------------------------------------------------------------ averaged


def test_linear_of_three_llamas_is_float64s_result(llamas: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    weights = {llamas["a"]: 0.7, llamas["b"]: 0.9, llamas["c"]: -0.3}
    merge(weighted_mean(weights, dtype="bfloat16"), out, replace(ROOMY, shard_size=60_000))
    assert len(list(out.glob("*.safetensors"))) > 1
    found, inputs = read_model(out), [read_model(model) for model in weights]
    assert found.keys() == inputs[0].keys()
    coefficients = [weight / sum(weights.values()) for weight in weights.values()]
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert beyond_one_ulp(tensor, [model[name] for model in inputs], coefficients) == 0, name
    assert "lm_head.weight" not in found
    assert config_of(out)["tie_word_embeddings"] is True
    model = loaded(out, "AutoModelForCausalLM")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert same_bits(model.model.embed_tokens.weight.detach(), found["model.embed_tokens.weight"])


def test_without_normalisation_weights_are_taken_as_they_are(llamas: dict[str, Path], tmp_path: Path) -> None:
    weights = {llamas["a"]: 1.0, llamas["b"]: -1.0}
    merge(weighted_mean(weights, parameters={"normalize": False}), tmp_path / "out", ROOMY)
    a, b = (read_model(llamas[name]) for name in "ab")
    for name, tensor in read_model(tmp_path / "out").items():
        assert same_bits(tensor, (a[name].float() - b[name].float()).to(torch.bfloat16)), name


def test_a_cast_rounds_once(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("wide", tiny_llama(layers=1), dtype="F32", fill=3)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        result = merge(sliced((model, 0, 1), dtype=name), tmp_path / name, ROOMY)
        assert result.plan.computes
        expected = {key: tensor.to(dtype) for key, tensor in read_model(model).items()}
        assert same_tensors(read_model(tmp_path / name), expected)
        assert config_of(tmp_path / name)["torch_dtype"] == name


def test_out_dtype_outweighs_dtype(llamas: dict[str, Path], tmp_path: Path) -> None:
    merge(sliced((llamas["a"], 0, 4), dtype="float16", out_dtype="float32"), tmp_path / "out", ROOMY)
    expected = {name: tensor.float() for name, tensor in read_model(llamas["a"]).items()}
    assert same_tensors(read_model(tmp_path / "out"), expected)


def test_mixed_dtypes_give_what_torch_promotes_to(tmp_path: Path) -> None:
    dtypes = ("F32", "F16", "BF16", "F64")
    shapes = {f"w{number}.weight": (3, 5) for number in range(len(dtypes))}
    first = write_checkpoint(tmp_path / "a", shapes, dtype="F16", fill=1)
    second = write_checkpoint(tmp_path / "b", shapes, dtype=dict(zip(shapes, dtypes, strict=True)), fill=2)
    merge(weighted_mean({first: 0.5, second: 0.5}), tmp_path / "out", ROOMY)
    a, b = read_model(first), read_model(second)
    for name, tensor in read_model(tmp_path / "out").items():
        wide = torch.promote_types(a[name].dtype, b[name].dtype)
        work = torch.promote_types(wide, torch.float32)
        assert same_bits(tensor, (a[name].to(work) * 0.5 + b[name].to(work) * 0.5).to(wide)), name


def test_gradients_follow_the_layers_of_a_slice(tmp_path: Path) -> None:
    shapes = {f"model.layers.{layer}.w.weight": (4,) for layer in range(5)} | {"model.norm.weight": (4,)}
    ones = write_checkpoint(tmp_path / "ones", {name: torch.ones(shape) for name, shape in shapes.items()})
    zero = write_checkpoint(tmp_path / "zero", {name: torch.zeros(shape) for name, shape in shapes.items()})
    both = [(ones, {"weight": [0, 1]}), (zero, {"weight": 1})]
    sources = [{"model": str(model), "layer_range": [0, 5], "parameters": values} for model, values in both]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources}] * 2, "parameters": {"normalize": False}}
    merge(recipe, tmp_path / "out", ROOMY)
    found = read_model(tmp_path / "out")
    for layer in range(10):  # the gradient restarts in the second slice
        assert found[f"model.layers.{layer}.w.weight"].tolist() == [layer % 5 / 4] * 4
    assert found["model.norm.weight"].tolist() == [0.0] * 4


def test_a_lone_model_of_multislerp_beside_its_base_is_cast(llamas: dict[str, Path], tmp_path: Path) -> None:
    models = [{"model": str(llamas[name]), "parameters": {"weight": 1}} for name in ("base", "a")]
    recipe = {"merge_method": "multislerp", "base_model": str(llamas["base"]), "models": models, "dtype": "float32"}
    result = merge(recipe, tmp_path / "out", ROOMY)
    expected = {name: tensor.float() for name, tensor in read_model(llamas["a"]).items()}
    assert same_tensors(read_model(tmp_path / "out"), expected)
    assert [unused.reason for unused in result.plan.built.unused] == [f"multislerp only uses that of {llamas['a']}"]


def test_a_model_without_a_head_gives_its_embedding(tmp_path: Path) -> None:
    tied = write_checkpoint(tmp_path / "tied", tiny_llama(tied=True), fill=1)
    untied = write_checkpoint(tmp_path / "untied", tiny_llama(), fill=2)
    merge(weighted_mean({tied: 0.5, untied: 0.5}), tmp_path / "mean", ROOMY)
    merge(sliced((untied, 0, 2), (tied, 2, 4)), tmp_path / "stack", ROOMY)
    embedding, head = read_model(tied)["model.embed_tokens.weight"], read_model(untied)["lm_head.weight"]
    mean = (embedding.float() * 0.5 + head.float() * 0.5).to(torch.bfloat16)
    for out, expected in (("mean", mean), ("stack", embedding)):
        assert same_bits(read_model(tmp_path / out)["lm_head.weight"], expected)
        assert config_of(tmp_path / out)["tie_word_embeddings"] is False
        loaded(tmp_path / out, "AutoModelForCausalLM")


def test_integers_are_copied_where_all_agree(tmp_path: Path) -> None:
    shapes: dict[str, Any] = {"model.layers.0.w.weight": (8, 8), "model.layers.0.table": (40,)}
    dtypes = {"model.layers.0.w.weight": "BF16", "model.layers.0.table": "I64"}
    same = [write_checkpoint(tmp_path / name, shapes, dtype=dtypes, fill=7) for name in "ab"]
    other = write_checkpoint(tmp_path / "c", shapes, dtype=dtypes, fill=8)
    merge(weighted_mean(dict.fromkeys(same, 0.5)), tmp_path / "out", ROOMY)
    name = "model.layers.0.table"
    assert same_bits(read_model(tmp_path / "out")[name], read_model(same[0])[name])
    with pytest.raises(CheckpointError, match=rf"{name}.*I64.*{same[0]}.*{other}"):
        merge(weighted_mean({same[0]: 0.5, other: 0.5}), tmp_path / "bad", ROOMY)
    assert not (tmp_path / "bad").exists()


# ------------------------------------------------------------------------------------------------ odd models


def test_tensors_of_every_size_and_name(tmp_path: Path) -> None:
    shapes: dict[str, Any] = {
        "scalar": (),
        "empty.weight": (0, 7),
        'quo"ted\\.weight': (2, 3),
        "línea.权重": (5,),
        "odd.weight": (33, 1001),
        "one": (1, 1, 1, 1),
    }
    models = [write_checkpoint(tmp_path / name, shapes, dtype="F16", fill=seed) for seed, name in enumerate("ab")]
    merge(weighted_mean(dict.fromkeys(models, 0.5)), tmp_path / "mean", ROOMY)
    merge({"merge_method": "passthrough", "models": [{"model": str(models[0])}]}, tmp_path / "copy", ROOMY)
    a, b = map(read_model, models)
    mean = {name: (a[name].float() * 0.5 + b[name].float() * 0.5).half() for name in a}
    assert same_tensors(read_model(tmp_path / "mean"), mean)
    assert same_tensors(read_model(tmp_path / "copy"), a)
    assert not (tmp_path / "copy" / "config.json").exists()


def test_a_model_of_a_single_empty_tensor_is_rejected(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "a", {"nothing": (0,)})
    with pytest.raises(CheckpointError, match=r"has 1 tensor without values \(nothing; shape \[0\]\): a trainer"):
        merge(weighted_mean({model: 1}), tmp_path / "out", ROOMY)


def test_bytes_that_are_no_numbers_are_passed_through(tmp_path: Path) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)  # every NaN and infinity, too
    tensors = {
        "w.weight": bits.view(torch.bfloat16),
        "f8.weight": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "f8.weight_scale_inv": torch.tensor([[3.0]]),
        "flags": torch.tensor([True, False]),
    }
    model = write_checkpoint(tmp_path / "a", tensors)
    merge({"merge_method": "passthrough", "models": [{"model": str(model)}]}, tmp_path / "out", ROOMY)
    assert same_tensors(read_model(tmp_path / "out"), tensors)


# ------------------------------------------------------------------------------------------------ one answer


METHODS: dict[str, dict[str, object]] = {
    "linear": {"weight": [0.2, 1]},
    "slerp": {"t": [0.1, 0.9]},
    "dare_ties": {"weight": 0.5, "density": 0.4},
}


@pytest.mark.parametrize("method", METHODS)
def test_bytes_depend_on_neither_budget_nor_threads_nor_slots(method: str, tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.w.weight": (300, 1001) for n in range(3)} | {"model.norm.weight": (1001,)}
    models = [write_checkpoint(tmp_path / name, shapes, fill=seed) for seed, name in enumerate("ab")]
    recipe: dict[str, Any] = {"merge_method": method, "parameters": METHODS[method], "slices": []}
    if method != "linear":
        recipe["base_model"] = str(models[0])
    for part in ([0, 2], [1, 3]):
        recipe["slices"].append({"sources": [{"model": str(model), "layer_range": part} for model in models]})
    first = plan(recipe, ROOMY)
    merge(first, tmp_path / "first")
    expected = digests(tmp_path / "first")
    floor = first.schedule.minimum_ram + (48 << 20)
    for number, (max_ram, threads) in enumerate(((floor, 1), (floor, 3), (8 << 30, 1))):
        out = tmp_path / f"budget{number}"
        merge(recipe, out, Options(max_ram=max_ram, device="cpu", threads=threads, keep_paths=True))
        assert digests(out) == expected
    chunks = set()
    for slot, tile in ((1 << 17, 1 << 15), (1 << 18, 1 << 17), (1 << 22, 1 << 16)):
        schedule = make_schedule(first.built.graph, first.schedule.budget, slot_bytes=slot)
        chunks.add(schedule.chunks(first.built.graph, 0))
        out = tmp_path / f"slot{slot}"
        merge(replace(first, schedule=replace(schedule, tile_elements=(tile,))), out)
        assert digests(out) == expected
    assert len(chunks) == 3
    if method == "dare_ties":
        merge(recipe, tmp_path / "seed", replace(ROOMY, seed=1))
        assert digests(tmp_path / "seed", "*.safetensors") != digests(tmp_path / "first", "*.safetensors")


def test_nothing_depends_on_where_things_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = replace(ROOMY, keep_paths=False)
    found = []
    for place, out in (("here", "out"), ("some/where else", "deep/er/zzz")):
        directory = tmp_path / place
        for seed, name in enumerate(("z-first", "a-second")):
            write_checkpoint(directory / name, tiny_llama(), shard_bytes=40_000, fill=seed)
        merge(weighted_mean({directory / "z-first": 0.5, directory / "a-second": 0.5}), tmp_path / out, published)
        found.append(digests(tmp_path / out))
        monkeypatch.chdir(directory)
        merge(weighted_mean({Path("z-first"): 0.5, Path("a-second"): 0.5}), tmp_path / out / "more", published)
        found.append(digests(tmp_path / out / "more"))
    assert all(each == found[0] for each in found)
    assert b"where" not in (tmp_path / "out" / "README.md").read_bytes()


def test_the_shard_size_moves_tensors_and_changes_none(llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = weighted_slices(llamas)
    models = []
    for size in (30_000, 200_000, 10**9):
        out = tmp_path / str(size)
        result = merge(recipe, out, replace(ROOMY, shard_size=size))
        files = list(out.glob("*.safetensors"))
        assert len(files) == len(result.plan.layout.shards)
        assert all(file.stat().st_size <= size for file in files)
        models.append(read_model(out))
    assert same_tensors(models[0], models[1])
    assert same_tensors(models[0], models[2])
