"""Several stages in one graph: the same bytes as running them one after the other, with nothing in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.merging import merge
from mergeloom.planning import Options, plan
from tests.models import encoder_dir, perturbed_encoder, tiny_llama, write_checkpoint
from tests.outputs import digests, read_model

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
    exact = THREE.format(**names, dtype="", out="float32")
    merge(write(tmp_path / "exact.yml", exact), tmp_path / "exact", ROOMY)
    reference, ours = read_model(tmp_path / "exact"), read_model(tmp_path / "fused")
    rounded = read_model(tmp_path / "bfloat16" / "out")

    def distance(model: dict) -> float:  # type: ignore[type-arg]
        return sum(float((model[n].float() - reference[n].float()).abs().sum()) for n in reference)

    assert distance(ours) <= distance(rounded)


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
