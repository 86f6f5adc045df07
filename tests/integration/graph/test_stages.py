"""Several stages in one graph: the same bytes as running them one after the other, with nothing in between."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import Tensor

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from tests.support.methods import reference
from tests.support.models import Model, encoder_dir, llama, perturbed_encoder, tiny_llama, write_checkpoint
from tests.support.outputs import config_of, digests, read_model, same_bits
from tests.support.paths import ROOT

RECIPES = ROOT / "recipes"

ROOMY = Options(max_ram=8 << 30, device="cpu")


def write(path: Path, text: str) -> Path:
    """A recipe file."""
    path.write_text(text)
    return path


FIRST = """\
slices:
  - sources: [{{model: {model}, layer_range: [0, 4]}}]
  - sources: [{{model: {model}, layer_range: [2, 6]}}]
merge_method: passthrough
dtype: bfloat16
"""
SECOND = """\
slices:
  - sources: [{{model: {middle}, layer_range: [0, 5]}}]
  - sources: [{{model: {middle}, layer_range: [3, 8]}}]
merge_method: passthrough
dtype: bfloat16
"""


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_stacks_of_stacks_are_stacks_of_the_source(tmp_path: Path, dtype: str) -> None:
    source = write_checkpoint(tmp_path / "source", tiny_llama(layers=6), dtype=dtype, fill=1)
    merge(write(tmp_path / "1.yml", FIRST.format(model=source)), tmp_path / "middle", ROOMY)
    merge(write(tmp_path / "2.yml", SECOND.format(middle=tmp_path / "middle")), tmp_path / "twice", ROOMY)
    both = "name: middle\n" + FIRST.format(model=source) + "---\n" + SECOND.format(middle="middle")
    planned = plan(write(tmp_path / "both.yml", both), ROOMY)
    merge(planned, tmp_path / "once")
    assert digests(tmp_path / "once", "*.safetensors") == digests(tmp_path / "twice", "*.safetensors")
    assert digests(tmp_path / "once", "config.json") == digests(tmp_path / "twice", "config.json")
    assert planned.built.layers == 10
    used = sum(ref.nbytes for ref in planned.built.graph.reads)
    assert planned.schedule.bytes_read == used <= sum(f.stat().st_size for f in source.glob("*.safetensors"))
    assert planned.schedule.bytes_reread == 0


def narrow_405b() -> Model:
    """Llama-3.1-405B's 126 layers, at narrow widths."""
    return llama(layers=126, hidden=8, intermediate=16, heads=2, kv_heads=1, vocabulary=32)


def test_the_1t_straight_from_the_405b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_checkpoint(
        tmp_path / "meta-llama/Meta-Llama-3.1-405B-Instruct", narrow_405b(), shard_bytes=100_000, fill=1
    )
    names = ("BigLlama-3.1-681B-Instruct", "BigLlama-3.1-1T-Instruct")
    options = Options(max_ram=8 << 30, device="cpu", shard_size=200_000)
    for name in names:
        merge(RECIPES / f"{name}.yml", tmp_path / "mlabonne" / name, options)
    planned = plan(RECIPES / "BigLlama-3.1-1T-from-405B.yml", options)
    result = merge(planned, tmp_path / "once").to_dict()

    once, twice = tmp_path / "once", tmp_path / "mlabonne" / names[1]
    assert digests(once, "model*") == digests(twice, "model*")
    assert digests(once, "config.json") == digests(twice, "config.json")
    assert config_of(once)["num_hidden_layers"] == 315
    assert len(list(once.glob("*.safetensors"))) == 5

    inputs, output = read_model(source), read_model(once)
    layers = [first + n for first in range(0, 105, 21) for n in range(42)]
    layers = [layer for first in (0, 52, 104) for layer in layers[first : first + 105]]
    assert len(layers) == 315
    for number, layer in enumerate(layers):
        for rest in ("self_attn.q_proj.weight", "post_attention_layernorm.weight"):
            assert same_bits(output[f"model.layers.{number}.{rest}"], inputs[f"model.layers.{layer}.{rest}"])

    unused = 125  # layer 209 of the 681B, which the published recipe leaves out
    assert set(layers) == set(range(unused))
    ((model, reason, left),) = [(found.model, found.reason, found.tensors) for found in planned.built.unused]
    assert model == "meta-llama/Meta-Llama-3.1-405B-Instruct"
    assert reason == "mlabonne/BigLlama-3.1-681B-Instruct: layer 209 is in no slice"
    assert len(left) == 9
    assert all(name.startswith(f"model.layers.{unused}.") for name in left)
    read = sum(tensor.nbytes for name, tensor in inputs.items() if f"layers.{unused}." not in name)
    written = sum(tensor.nbytes for tensor in output.values())
    for said in (planned.to_dict(), result, result["measured"]):
        assert said["bytes_written"] == written
        assert said["bytes_read"] == read
    assert planned.schedule.bytes_reread == 0


THREE = """\
name: ball
merge_method: slerp
base_model: {a}
models: [{{model: {b}}}]
parameters: {{t: [0.2, 0.7]}}
{dtype}
---
name: vote
merge_method: ties
base_model: {a}
models:
  - {{model: {b}, parameters: {{weight: 0.7, density: 0.6}}}}
  - {{model: {c}, parameters: {{weight: 0.5, density: 0.4}}}}
{dtype}
---
merge_method: linear
models:
  - {{model: ball, parameters: {{weight: 0.25}}}}
  - {{model: vote, parameters: {{weight: 0.75}}}}
dtype: {out}
"""


def by_definition(a: Tensor, b: Tensor, c: Tensor, t: float) -> Tensor:
    """What the three stages make of three float64 tensors; none of mergeloom's code has a part in it."""
    (ball, *_) = reference.slerp([a, b], base=0, t=t).outputs
    kept = [reference.top_k(b - a, 0.6), reference.top_k(c - a, 0.4)]
    kept = [kept[0], kept[0], kept[1]]  # the base's own is not looked at
    vote = reference.task_vectors(
        [a, b, c], kept[1:], base=0, weight=[0, 0.7, 0.5], elect=True, normalize=True, rescale=False
    )
    return 0.25 * ball + 0.75 * vote.outputs[0]


def test_slerp_ties_and_linear_fuse(tmp_path: Path) -> None:
    a = encoder_dir()
    b, c = (perturbed_encoder(tmp_path / name, seed) for seed, name in ((1, "b"), (2, "c")))
    names = {"a": a, "b": b, "c": c}
    fused = THREE.format(**names, dtype="", out="bfloat16")
    merge(write(tmp_path / "fused.yml", fused), tmp_path / "fused", ROOMY)
    for middle in ("float32", "bfloat16"):
        ball, vote, last = THREE.format(**names, dtype=f"dtype: {middle}", out="bfloat16").split("---\n")
        merge(write(tmp_path / "ball.yml", ball), tmp_path / middle / "ball", ROOMY)
        merge(write(tmp_path / "vote.yml", vote), tmp_path / middle / "vote", ROOMY)
        last = last.replace("model: ball", f"model: {tmp_path / middle / 'ball'}")
        last = last.replace("model: vote", f"model: {tmp_path / middle / 'vote'}")
        merge(write(tmp_path / "last.yml", last), tmp_path / middle / "out", ROOMY)
    assert digests(tmp_path / "fused", "*.safetensors") == digests(tmp_path / "float32/out", "*.safetensors")

    ours, rounded = read_model(tmp_path / "fused"), read_model(tmp_path / "bfloat16" / "out")
    inputs = [read_model(model) for model in (a, b, c)]
    distances = [0.0, 0.0]
    for name in ours:
        if not ours[name].is_floating_point() or ours[name].numel() > 1 << 20:
            continue  # the embeddings alone are as many as all the rest
        layer = re.search(r"layer\.(\d+)\.", name)
        t = 0.2 + 0.5 * int(layer[1]) / 5 if layer else 0.2
        exact = by_definition(*(model[name].double() for model in inputs), t)
        found = [float((made[name].double() - exact).abs().sum()) for made in (ours, rounded)]
        distances = [total + one for total, one in zip(distances, found, strict=True)]
        # bfloat16 has 8 bits: what was rounded once is within half of its last one, but where a vote was near a tie
        off = (ours[name].double() - exact).abs() > exact.abs() * 2.0**-8 + 1e-7
        assert int(off.sum()) <= 1e-4 * off.numel(), name
    assert distances[0] < distances[1]


def test_out_dtype_rounds_an_intermediate(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tiny_llama(), dtype="F32", fill=1)
    other = write_checkpoint(tmp_path / "other", tiny_llama(), dtype="F32", fill=2)
    first = (
        f"merge_method: linear\nmodels:\n  - {{model: {source}, parameters: {{weight: 0.3}}}}\n"
        f"  - {{model: {other}, parameters: {{weight: 0.7}}}}\nout_dtype: bfloat16\n"
    )
    second = "merge_method: passthrough\nmodels: [{{model: {middle}, parameters: {{scale: 1.5}}}}]\ndtype: float32\n"
    merge(write(tmp_path / "1.yml", first), tmp_path / "middle", ROOMY)
    merge(write(tmp_path / "2.yml", second.format(middle=tmp_path / "middle")), tmp_path / "twice", ROOMY)
    both = "name: middle\n" + first + "---\n" + second.format(middle="middle")
    merge(write(tmp_path / "both.yml", both), tmp_path / "once", ROOMY)
    assert digests(tmp_path / "once", "*.safetensors") == digests(tmp_path / "twice", "*.safetensors")
