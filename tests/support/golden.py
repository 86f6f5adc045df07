"""The merges whose output bytes are pinned in tests/golden, and how their digests are taken.

`python -m tests.support.golden` writes the digests anew. Do that only for a change that is meant to alter output bytes:
it raises ARITHMETIC_VERSION or LAYOUT_VERSION, and the changelog names the methods that changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy
import yaml

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from tests.support import models
from tests.support.mergekit.configurations import CONFIGURATIONS
from tests.support.methods.cases import CASES, make
from tests.support.methods.kernels import run_kernel
from tests.support.models.published import SHAPES
from tests.support.models.zoo import write_zoo
from tests.support.paths import ROOT

GOLDEN = ROOT / "tests" / "golden"
RECIPES = ROOT / "recipes"

KEY = 0x1234_5678_9ABC_DEF1
KINDS = ("lattice", "float32", "mixed", "float64")
SHAPE = (83, 517)
OPTIONS = Options(device="cpu", threads=1, max_ram=4 << 30, shard_size=60_000)

STACK = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
  - sources: [{model: a, layer_range: [2, 4]}]
"""
RANDOM = """\
merge_method: dare_ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.4, density: 0.3}}
  - {model: b, parameters: {weight: 0.6, density: 0.7}}
dtype: bfloat16
"""
THREE_STAGES = """\
name: ball
merge_method: slerp
base_model: a
models: [{model: b}]
parameters: {t: [0.2, 0.7]}
---
name: vote
merge_method: ties
base_model: a
models:
  - {model: b, parameters: {weight: 0.7, density: 0.6}}
  - {model: c, parameters: {weight: 0.5, density: 0.4}}
out_dtype: bfloat16
---
merge_method: linear
models:
  - {model: ball, parameters: {weight: 0.25}}
  - {model: vote, parameters: {weight: 0.75}}
dtype: bfloat16
"""
SAVED_STAGE = """\
name: middle
save: true
merge_method: linear
models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.7}}]
dtype: bfloat16
---
merge_method: slerp
base_model: middle
models: [{model: b}]
parameters: {t: 0.4}
dtype: bfloat16
"""
ENCODERS = """\
merge_method: {method}
base_model: encoder
models:
  - {{model: b, parameters: {{weight: 0.6, density: 0.4}}}}
  - {{model: c, parameters: {{weight: 0.7, density: 0.6}}}}
parameters: {{t: 0.3}}
"""

OWN: dict[str, tuple[str, Options]] = {
    "a stack in small shards": (STACK, OPTIONS),
    "a stack in one shard": (STACK, replace(OPTIONS, shard_size=5 * 10**9)),
    "a stack as bfloat16": (STACK + "dtype: bfloat16\n", OPTIONS),
    "embeddings, norm and head of other models": (STACK + "outside: {embeddings: b, norm: c, head: a}\n", OPTIONS),
    "dare_ties, seed 0": (RANDOM, OPTIONS),
    "dare_ties, seed 7": (RANDOM, replace(OPTIONS, seed=7)),
    "three stages": (THREE_STAGES, OPTIONS),
    "a saved stage": (SAVED_STAGE, OPTIONS),
}
"""Recipes over the zoo that `mergekit_configurations` has no place for."""

ENCODER_METHODS = ("ties", "della", "model_stock")


def output_digests(out: Path) -> dict[str, str]:
    """What a merge wrote, twice: its shards with their names, headers and layout, and its tensors alone.

    A change of layout alters only ``shards``, a change of arithmetic both. Read without mergeloom's code.
    """
    shards, tensors = hashlib.sha256(), {}
    for file in sorted(out.rglob("*.safetensors")):
        data, name = file.read_bytes(), str(file.relative_to(out))
        shards.update(f"{name} {len(data)}\n".encode() + data)
        start = 8 + int.from_bytes(data[:8], "little")
        for key, entry in json.loads(data[8:start]).items():
            if key != "__metadata__":
                low, high = entry["data_offsets"]
                facts = f"{file.parent.relative_to(out)}/{key} {entry['dtype']} {entry['shape']}\n".encode()
                tensors[f"{name} {key}"] = facts + data[start + low : start + high]
    ordered = sorted(tensors.items(), key=lambda item: (item[0].rpartition("/")[0], item[0].split(" ", 1)[1]))
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for _, content in ordered))
    return {"shards": shards.hexdigest()[:32], "tensors": digest.hexdigest()[:32]}


def merge_text(text: str, work: Path, options: Options = OPTIONS) -> dict[str, str]:
    """Merge a recipe, whose models are paths in the current directory, and digest the output."""
    file, out = work / "recipe.yml", work / "out"
    file.write_text(text)
    merge(file, out, options)
    return output_digests(out)


# ------------------------------------------------------------------------------------------------ the catalogue


def write_models(directory: Path) -> Path:
    """Write the zoo, the encoders and narrow twins of the published recipes' models below `directory`."""
    write_zoo(directory)
    (directory / "encoder").symlink_to(models.encoder_dir())
    for seed, name in enumerate("bc", 1):
        models.perturbed_encoder(directory / "encoders" / name, seed)
    (directory / "encoders" / "encoder").symlink_to(models.encoder_dir())
    for seed, (name, preset) in enumerate(SHAPES.items()):
        layers = preset().config["num_hidden_layers"]
        narrow = models.llama(layers=layers, hidden=16, intermediate=32, heads=2, kv_heads=1, vocabulary=48)
        fill = models.FineTune(models.Random(0), seed)
        models.write_tokenizer(models.write_checkpoint(directory / "hub" / name, narrow, fill=fill))
    return directory


def merges() -> dict[str, tuple[str, str, Options]]:
    """Every golden merge: by name its recipe, the directory below `write_models` to run it in, and its options."""
    found = {f"configuration: {name}": (text, ".", OPTIONS) for name, text in CONFIGURATIONS.items()}
    found |= {f"own: {name}": (text, ".", options) for name, (text, options) in OWN.items()}
    found |= {f"encoder: {name}": (ENCODERS.format(method=name), "encoders", OPTIONS) for name in ENCODER_METHODS}
    for file in sorted(RECIPES.rglob("*.yml")):
        found[f"published: {file.relative_to(RECIPES)}"] = (file.read_text(), "hub", OPTIONS)
    return found


def kernel_digests() -> dict[str, str]:
    """The digest of what every case of the conformance suite computes, by case and kind of input."""
    found = {}
    for case in CASES:
        for kind in KINDS:
            inputs = make(kind, case.models, SHAPE, case.base)
            output = run_kernel(case.kernel(inputs), inputs, key=KEY).output
            data = output.contiguous().view(-1).numpy()
            assert data.dtype in (numpy.float32, numpy.float64)
            found[f"{case}; {kind}"] = hashlib.sha256(data.tobytes()).hexdigest()[:32]
    return found


def read_golden(name: str) -> Mapping[str, object]:
    """The pinned digests of tests/golden/NAME.json."""
    content: Mapping[str, object] = json.loads((GOLDEN / f"{name}.json").read_text())
    return content


def _write(name: str, content: Mapping[str, object]) -> None:
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _all_merges(directory: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for name, (text, folder, options) in merges().items():
        with tempfile.TemporaryDirectory() as work, contextlib.chdir(directory / folder):
            yield name, merge_text(text, Path(work), options)


def main() -> None:
    """Write all golden files anew."""
    _write("kernels", kernel_digests())
    with tempfile.TemporaryDirectory() as directory:
        _write("merges", dict(_all_merges(write_models(Path(directory)))))
    methods = {document["merge_method"] for text, _, _ in merges().values() for document in yaml.safe_load_all(text)}
    print(f"{len(merges())} merges by {len(methods)} methods, {len(CASES) * len(KINDS)} kernels", file=sys.stderr)


if __name__ == "__main__":
    main()
