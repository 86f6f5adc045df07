"""Extracted adapters are verified like merges, and a directory is named by what it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mergeloom
from mergeloom.engine.run.extract import staging
from mergeloom.engine.run.verify import verify
from mergeloom.errors import CheckpointError, MergeloomError, UsageError
from mergeloom.io.output.digests import BLOCK_BYTES
from mergeloom.io.output.lock import EXTRACTION, MANIFEST
from tests.support.command_line import run
from tests.support.extraction.families import save_pair
from tests.support.extraction.matrices import noise, save_models
from tests.support.faults import Kill, Stopped, watching
from tests.support.outputs import digests

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FOREIGN = f"which has a {MANIFEST}, or of an extracted adapter, which has a {EXTRACTION}"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A fine-tune in which one expert is unchanged, and its base."""
    save_pair(tmp_path, "qwen3 moe")
    tuned, base = tmp_path / "tuned", tmp_path / "base"
    same = {name: tensor for name, tensor in tensors_of(base).items() if "layers.0.mlp.experts.2." in name}
    save_file(tensors_of(tuned) | same, tuned / "model.safetensors", {"format": "pt"})
    return tuned, base


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model."""
    return load_file(model / "model.safetensors")


@pytest.fixture
def adapter(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """An extracted adapter, some of whose factors are zeros that fill up a group of experts."""
    mergeloom.extract_lora(*pair, tmp_path / "adapter", rank=4)
    return tmp_path / "adapter"


def digest_of(data: bytes) -> str:
    """The digest that manifests document, of all blocks at once."""
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    return xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_128_digest(block) for block in blocks))


def test_the_manifest_has_the_digests_of_what_is_in_the_files(adapter: Path, pair: tuple[Path, Path]) -> None:
    found, stored = json.loads((adapter / EXTRACTION).read_text()), load_file(adapter / WEIGHTS)
    expected = {name: digest_of(tensor.numpy().tobytes()) for name, tensor in stored.items()}
    assert found["tensors"] == expected
    assert sum(not tensor.any() for tensor in stored.values()) == 6  # the factors of three matrices
    assert found["files"] == {CONFIG: xxhash.xxh3_128_hexdigest((adapter / CONFIG).read_bytes())}
    data = (adapter / WEIGHTS).read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    assert found["shards"] == {WEIGHTS: [len(data), xxhash.xxh3_128_hexdigest(header)]}
    assert (found["models"], found["local_models"]) == (["tuned", "base"], [0, 1])
    verdict = verify(adapter)
    assert verdict.whole
    assert not verdict.unverified
    assert (verdict.tensors, verdict.nbytes, verdict.files) == (
        len(stored),
        sum(tensor.nbytes for tensor in stored.values()),
        2,
    )


def test_digests_of_tensors_larger_than_a_block(tmp_path: Path) -> None:
    sizes = [BLOCK_BYTES + 5, 0, 3, BLOCK_BYTES]
    data = np.random.default_rng(0).bytes(sum(sizes))
    found, position = staging.TensorDigests(sizes), 0
    for step in (7, BLOCK_BYTES - 3, 2, 6, BLOCK_BYTES):  # over the ends of blocks, and of tensors
        found.feed(memoryview(data)[position : position + step])
        position += step
    ends = np.cumsum(sizes)
    assert found.digests() == [digest_of(data[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    assert staging.zeros_digest(BLOCK_BYTES + 5) == digest_of(bytes(BLOCK_BYTES + 5))


def flip(file: Path, position: int) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_is_found_in_every_tensor(adapter: Path) -> None:
    with safe_open(adapter / WEIGHTS, "pt") as file:
        names = list(file.keys())
    header = json.loads((adapter / WEIGHTS).read_bytes()[8:].partition(b"}}")[0] + b"}}")
    start = 8 + int.from_bytes((adapter / WEIGHTS).read_bytes()[:8], "little")
    for name in names:
        flip(adapter / WEIGHTS, start + header[name]["data_offsets"][1] - 1)
        assert verify(adapter).damaged == (f"tensor {name} in {WEIGHTS} was changed",)
        flip(adapter / WEIGHTS, start + header[name]["data_offsets"][1] - 1)
    assert verify(adapter).whole


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda out: flip(out / WEIGHTS, -1), "was changed; copy it from an intact copy, or extract the"),
    "the header": (lambda out: flip(out / WEIGHTS, 20), f"{WEIGHTS}: its header was changed"),
    "the end": (lambda out: (out / WEIGHTS).write_bytes((out / WEIGHTS).read_bytes()[:-1]), "bytes instead of"),
    "no weights": (lambda out: (out / WEIGHTS).unlink(), WEIGHTS),
    "another config": (lambda out: flip(out / CONFIG, 3), f"{CONFIG}: was changed; copy it"),
    "no config": (lambda out: (out / CONFIG).unlink(), f"{CONFIG}: is missing; copy it"),
    "the manifest": (lambda out: flip(out / EXTRACTION, 30), f"{EXTRACTION}: was changed since it was written"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_by_verify_and_if_it_is_extracted_again(
    adapter: Path, pair: tuple[Path, Path], damage: str
) -> None:
    change, message = DAMAGE[damage]
    change(adapter)
    verified, extracted = run("verify", adapter), run("extract-lora", *pair, adapter, "--rank", 4)
    assert verified.returncode == 4
    assert message in verified.stderr
    if damage == "a byte":  # which only verify reads
        assert "already complete" in extracted.stderr
        assert extracted.returncode == 0
    else:
        assert extracted.returncode == 4
        assert message.partition(";")[0] in extracted.stderr


def test_a_tokenizer_that_was_added_is_named(adapter: Path) -> None:
    (adapter / "README.md").write_text("mine")
    assert run("verify", adapter).returncode == 0
    (adapter / "tokenizer.json").write_text("{}")
    ended = run("verify", adapter)
    assert ended.returncode == 4
    assert "files that the extraction did not write: tokenizer.json; move them out\n" in ended.stderr


def test_sources_are_compared_by_their_names(
    adapter: Path, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    second = tmp_path / "second"
    mergeloom.extract_lora(f"{pair[1]}+{adapter}", pair[1], second, rank=4)
    assert verify(second, sources=True).missing_sources == ()
    shutil.move(adapter, tmp_path / "moved")
    (missing,) = verify(second, sources=True).missing_sources
    assert missing.startswith(f'{WEIGHTS} of adapter: no directory "adapter" here')
    given = {"adapter": str(tmp_path / "moved")}
    assert verify(second, sources=True, models=given).missing_sources == ()
    flip(tmp_path / "moved" / WEIGHTS, -1)
    assert verify(second, sources=True, models=given).changed_sources == (str(tmp_path / "moved" / WEIGHTS),)
    ended = run("verify", second, "--sources", "--model", f"adapter={tmp_path / 'moved'}")
    assert f"has changed since the extraction; {second} is undamaged, and only a new extraction would" in ended.stderr


# ------------------------------------------------------------------------------------------------ other directories


def write_recipe(models: tuple[Path, ...], directory: Path) -> Path:
    """A recipe for the sum of models."""
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(each), "parameters": {"weight": 1}} for each in models],
    }
    (directory / "recipe.yml").write_text(yaml.safe_dump(recipe))
    return directory / "recipe.yml"


def test_a_merge_and_an_extraction_name_each_others_results(
    adapter: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, merged = write_recipe(pair, tmp_path), tmp_path / "merged"
    mergeloom.merge(recipe, merged)
    before = digests(adapter), digests(merged)
    rule = "; OUT must be a new or empty directory, and nothing in it is overwritten\n"
    for ended, text in (
        (run("extract-lora", *pair, merged, "--rank", 4), f"{merged}: holds a finished merge{rule}"),
        (run("merge", recipe, adapter), f"{adapter}: holds a finished extraction of an adapter{rule}"),
        (run("plan", recipe, adapter), f"{adapter}: holds a finished extraction of an adapter{rule}"),
    ):
        assert ended.returncode == 2
        assert ended.stderr.endswith(f"mergeloom: {text}"), ended.stderr
    assert (digests(adapter), digests(merged)) == before
    assert verify(merged).whole
    assert verify(adapter).whole


def test_verify_says_what_a_directory_holds(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as foreign:
        verify(pair[1])
    assert str(foreign.value) == (
        f"{pair[1]}: is not empty (config.json, generation_config.json, model.safetensors), and mergeloom did not "
        f"write these files; expected the directory of a finished merge, {FOREIGN}"
    )
    with pytest.raises(CheckpointError) as absent:
        verify(tmp_path / "absent")
    assert str(absent.value).endswith(
        f"there is no such directory; expected the directory of a finished merge, {FOREIGN}"
    )


def test_a_path_that_is_too_long_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(MergeloomError, match="too long"):
        verify(tmp_path / ("x" * 300))


def test_verify_says_that_an_extraction_is_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "COMMIT_SECONDS", 0.0)
    base = {f"model.layers.{layer}.q_proj.weight": noise(layer, 24, 16) for layer in range(8)}
    models = save_models(tmp_path, base, {name: noise(5, 24, 16, 0.1) for name in base})
    out = tmp_path / "out"
    with watching(Kill(60)), pytest.raises(Stopped):
        mergeloom.extract_lora(*models, out, rank=2, threads=1)
    for command in (("verify", out), ("inspect", f"{models[1]}+{out}")):
        ended = run(*command)
        assert ended.returncode == 4, ended.stderr
        text = f"{out}: holds an unfinished extraction of an adapter; run the command that began it again, to finish it"
        assert ended.stderr.endswith(f"{text}\n")
    mergeloom.extract_lora(*models, out, rank=2, threads=1)
    assert verify(out).whole
