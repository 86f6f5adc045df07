"""Trust nothing that was downloaded: mutated headers, recipes, indices and configs end with an error of ours, or well.

`make soak` tries a hundred times as many.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
from pathlib import Path

import pytest

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, MergeloomError
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from mergeloom.io.safetensors.header import read_header
from tests.examples import examples
from tests.support.counting import count_lines
from tests.support.models import tiny_llama, write_checkpoint
from tests.support.mutations import BYTES, LINES, fuzz
from tests.support.waiting import no_hang


@pytest.mark.parametrize(
    ("kind", "count"), [("headers", 4000), ("recipes", 600), ("plans", 200), ("indices", 400), ("configs", 100)]
)
def test_mutated_inputs_end_with_an_error_of_ours_or_well(kind: str, count: int, tmp_path: Path) -> None:
    count = examples(count)
    outcome = fuzz(kind, count, 1, tmp_path)  # `make soak` draws others
    assert outcome.failures == []
    assert outcome.tried == count
    assert outcome.refused > count // 5
    assert 0 < outcome.lines <= LINES
    assert outcome.grown < BYTES


# ------------------------------------------------------------------------------------------------ made by hand


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_no_pickle_is_run(name: str, tmp_path: Path) -> None:
    """It would write a file, if it were unpickled."""
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self) -> object:
            return (Path.touch, (witness,))

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Evil()))
    for path in (tmp_path / "model", tmp_path / "model" / name):
        with pytest.raises(CheckpointError, match="safetensors"):
            open_checkpoint(path)
    renamed = tmp_path / "model" / "model.safetensors"
    renamed.write_bytes((tmp_path / "model" / name).read_bytes())
    with pytest.raises(CheckpointError):
        open_checkpoint(renamed)
    assert not witness.exists()


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/dev/zero", "a/../../secret.safetensors", "..", "\0", ""])
def test_no_index_leads_out_of_its_directory(shard: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"x": (2,)}).joinpath("model.safetensors").rename(tmp_path / "secret.safetensors")
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(model)


@pytest.mark.parametrize("kind", ["device", "pipe", "directory", "loop"])
def test_weights_that_are_no_file_hang_nothing(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    if kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(file)
    with no_hang(), pytest.raises(MergeloomError):
        read_header(file)


def test_sizes_are_bounded_before_anything_is_allocated(tmp_path: Path) -> None:
    """A sparse file of terabytes whose header gives its own length as nearly all of the file; a config of gigabytes."""
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((4 << 40).to_bytes(8, "little"))
        stream.truncate(5 << 40)
    with pytest.raises(CheckpointError, match="past the format's limit"):
        read_header(file)
    model = write_checkpoint(tmp_path / "model", tiny_llama())
    for name in ("config.json", "tokenizer_config.json", "modules.json", "tokenizer.json"):
        kept = (model / name).read_bytes() if (model / name).exists() else None
        with (model / name).open("wb") as stream:
            stream.truncate(20 << 30)
        recipe = {"merge_method": "passthrough", "models": [{"model": str(model)}], "tokenizer_source": "base"}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(MergeloomError):
            merge(
                {**recipe, "base_model": str(model)}, tmp_path / f"out {name}", Options(device="cpu", max_ram=1 << 40)
            )
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < BYTES >> 10
        (model / name).unlink()
        if kept is not None:
            (model / name).write_bytes(kept)


def test_yaml_that_grows_is_refused(tmp_path: Path) -> None:
    """A billion laughs: a few lines that would be gigabytes."""
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    for text in ("\n".join([*lines, "merge_method: linear", "models: *a11"]), "a: &a [*a]", "? " * 5000, "[" * 100_000):
        (tmp_path / "recipe.yml").write_text(text)

        def refused() -> None:
            with pytest.raises(MergeloomError):
                plan(tmp_path / "recipe.yml", Options(device="cpu"))

        count_lines(refused, LINES)
