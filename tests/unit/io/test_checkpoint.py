"""A checkpoint is found in each of the layouts that models come in, and what is wrong with one is said."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergeloom.errors import CheckpointError
from mergeloom.io.safetensors.checkpoint import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, Checkpoint, open_checkpoint
from mergeloom.io.safetensors.dtypes import F32
from mergeloom.io.safetensors.header import build_header

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(file: Path, *names: str, metadata: Mapping[str, str] | None = None) -> Path:
    """A file whose tensors are float32 vectors of two elements."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(build_header([(name, F32, (2,)) for name in names], metadata or {}) + bytes(8 * len(names)))
    return file


def write_index(directory: Path, weight_map: Any, name: str = INDEX) -> Path:
    """An index as transformers writes it."""
    index = directory / name
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A directory with an index and two shards: c and a in the first, b in the second."""
    write(tmp_path / SHARDS[0], "c", "a")
    write(tmp_path / SHARDS[1], "b")
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]})
    return tmp_path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def file_names(checkpoint: Checkpoint) -> list[str]:
    return [file.name for file in checkpoint.files]


# ------------------------------------------------------------------------------------------- layouts


def test_a_directory_with_an_index(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.path == sharded
    assert file_names(checkpoint) == list(SHARDS)
    assert checkpoint.tensors["b"].file == sharded / SHARDS[1]
    assert (checkpoint.config, checkpoint.ignored, checkpoint.remarks) == (None, (), ())


def test_tensors_come_by_file_and_in_it_by_their_bytes(sharded: Path) -> None:
    assert list(open_checkpoint(sharded).tensors) == ["c", "a", "b"]


def test_an_index_given_by_its_path(sharded: Path) -> None:
    assert list(open_checkpoint(sharded / INDEX).tensors) == ["c", "a", "b"]


def test_an_index_of_another_name(tmp_path: Path) -> None:
    write(tmp_path / "part.safetensors", "a")
    write_index(tmp_path, {"a": "part.safetensors"}, "diffusion.safetensors.index.json")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_of_several_indexes_the_models_counts(sharded: Path) -> None:
    write_index(sharded, {"x": "absent.safetensors"}, "other.safetensors.index.json")
    assert list(open_checkpoint(sharded).tensors) == ["c", "a", "b"]


def test_several_indexes_of_other_names_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_index(tmp_path, {}, f"{name}.safetensors.index.json")
    assert "several indexes ('a.safetensors.index.json', 'b.safetensors.index.json')" in refused(tmp_path)


def test_a_single_file(tmp_path: Path) -> None:
    file = write(tmp_path / "some.safetensors", "a", metadata={"format": "pt"})
    for path in (file, tmp_path):
        checkpoint = open_checkpoint(path)
        assert checkpoint.files == (file,)
        assert checkpoint.metadata == {"format": "pt"}


def test_a_single_file_of_any_name(tmp_path: Path) -> None:
    assert list(open_checkpoint(write(tmp_path / "blobs" / "abc", "a")).tensors) == ["a"]


def test_several_files_without_an_index_are_united(tmp_path: Path) -> None:
    write(tmp_path / "b.safetensors", "x", metadata={"format": "np", "made": "b"})
    write(tmp_path / "a.safetensors", "y", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["y", "x"]
    assert file_names(checkpoint) == ["a.safetensors", "b.safetensors"]
    assert checkpoint.metadata == {"format": "pt", "made": "b"}


def test_one_name_in_two_files_without_an_index_is_an_error_that_names_both(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", "x")
    write(tmp_path / "b.safetensors", "x")
    error = refused(tmp_path)
    assert "tensor 'x'" in error
    assert "a.safetensors" in error
    assert "b.safetensors" in error


def test_model_safetensors_is_all_of_a_model_without_an_index(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "a")
    stale = write(tmp_path / "model.fp16.safetensors", "a")
    checkpoint = open_checkpoint(tmp_path)
    assert file_names(checkpoint) == ["model.safetensors"]
    assert checkpoint.ignored == (stale,)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs" / "abc", "a")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / SHARDS[0]).symlink_to(blob)
    assert list(open_checkpoint(snapshot).tensors) == ["a"]
    write_index(snapshot, {"a": SHARDS[0]})
    assert open_checkpoint(snapshot).files == (snapshot / SHARDS[0],)


def test_shards_in_a_folder_of_the_model(tmp_path: Path) -> None:
    write(tmp_path / "weights" / "1.safetensors", "a")
    write_index(tmp_path, {"a": "./weights/1.safetensors"})
    assert open_checkpoint(tmp_path).files == (tmp_path / "weights" / "1.safetensors",)


def test_two_spellings_of_one_shard_are_one_file(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "c": "./" + SHARDS[0]})
    assert file_names(open_checkpoint(sharded)) == list(SHARDS)


def test_many_shards_come_in_order(tmp_path: Path) -> None:
    names = [f"model-{number:05}-of-00191.safetensors" for number in range(1, 192)]
    for name in names:
        write(tmp_path / name, f"of {name}")
    write_index(tmp_path, {f"of {name}": name for name in reversed(names)})
    checkpoint = open_checkpoint(tmp_path)
    assert file_names(checkpoint) == names
    assert list(checkpoint.tensors) == [f"of {name}" for name in names]


# ------------------------------------------------------------------------------------------- what is left out


def test_a_stale_shard_is_ignored_and_recorded(sharded: Path) -> None:
    stale = sharded / "model-00003-of-00003.safetensors"
    stale.write_bytes(b"not even opened")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.ignored == (stale,)
    assert file_names(checkpoint) == list(SHARDS)


def test_the_index_wins_over_consolidated_weights_and_the_original_folder(sharded: Path) -> None:
    consolidated = write(sharded / "consolidated.safetensors", "layers.0.a")
    write(sharded / "original" / "model.safetensors", "x")
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.tensors) == ["c", "a", "b"]
    assert checkpoint.ignored == (consolidated,)


def test_consolidated_weights_are_left_out_of_a_union(tmp_path: Path) -> None:
    for name in ("a", "b", "consolidated.00", "adapter_model"):
        write(tmp_path / f"{name}.safetensors", name)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert [file.name for file in checkpoint.ignored] == ["adapter_model.safetensors", "consolidated.00.safetensors"]


def test_consolidated_weights_alone_are_the_model(tmp_path: Path) -> None:
    write(tmp_path / "consolidated.safetensors", "a")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_hidden_files_are_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", "a")
    (tmp_path / "._a.safetensors").write_bytes(b"\0\5\26\7")
    assert open_checkpoint(tmp_path).ignored == ()


def test_an_index_wins_over_a_model_safetensors_that_it_does_not_name(sharded: Path) -> None:
    other = write(sharded / "model.safetensors", "z")
    checkpoint = open_checkpoint(sharded)
    assert "z" not in checkpoint.tensors
    assert checkpoint.ignored == (other,)


# ------------------------------------------------------------------------------------------- index against shards


def test_a_tensor_that_its_shard_lacks_is_an_error_that_names_both(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0], "d": SHARDS[1]})
    error = refused(sharded)
    assert f"tensor 'd' is in '{SHARDS[1]}', which doesn't hold it:" in error


def test_a_tensor_in_another_shard_than_the_index_says_is_an_error_that_names_it(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[1], "b": SHARDS[1], "c": SHARDS[0]})
    error = refused(sharded)
    assert f"tensor 'a' is in '{SHARDS[1]}', which doesn't hold it; it lies in '{SHARDS[0]}' instead" in error


def test_a_tensor_that_the_index_does_not_list_is_used_and_said(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1]})
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.tensors) == ["c", "a", "b"]
    assert any("doesn't list 'c'" in remark for remark in checkpoint.remarks)


def test_of_two_copies_the_one_that_the_index_gives_counts_and_it_is_said(sharded: Path) -> None:
    write(sharded / SHARDS[1], "b", "a")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.tensors["a"].file == sharded / SHARDS[0]
    assert any("'a': in several files" in remark for remark in checkpoint.remarks)


def test_two_copies_that_the_index_does_not_list_are_an_error(sharded: Path) -> None:
    write(sharded / SHARDS[1], "b", "c")
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1]})
    error = refused(sharded)
    assert "'c'" in error
    assert all(shard in error for shard in SHARDS)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    error = refused(sharded)
    assert "1 of the 2 files that it names are missing" in error
    assert SHARDS[1] in error


def test_a_shard_that_is_a_broken_link_is_missing(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[1]).symlink_to("../../blobs/abc")
    assert "are missing" in refused(sharded)


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    with (sharded / SHARDS[1]).open("ab") as file:
        file.write(b"x")
    assert refused(sharded).startswith(str(sharded / SHARDS[1]))


# ------------------------------------------------------------------------------------------- names in an index


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "a/../../x.safetensors", "a/../x.safetensors", "/etc/x.safetensors", "x\0.safetensors"),
        *("..\\x.safetensors", "a\\..\\..\\x.safetensors", "\\x.safetensors", "C:\\x.safetensors", "C:x.safetensors"),
    ],
)
def test_a_shard_name_that_leaves_the_directory_is_refused(name: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write(tmp_path / "x.safetensors", "a")
    write(model / "y.safetensors", "b")
    write_index(model, {"b": "y.safetensors", "a": name})
    assert "leaves the model's directory" in refused(model)


@pytest.mark.parametrize("name", ["", ".", "x", "x.json", "x.safetensors/"])
def test_a_shard_name_that_is_no_safetensors_file_is_refused(name: str, tmp_path: Path) -> None:
    write_index(tmp_path, {"a": name})
    assert "which is no .safetensors file" in refused(tmp_path)


def test_an_index_that_names_pickles_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "pytorch_model.bin"})
    assert "pickles" in refused(tmp_path)


@pytest.mark.parametrize("name", ["\ud800.safetensors", "x" * 300 + ".safetensors"], ids=["surrogate", "too long"])
def test_a_shard_name_that_no_system_has_is_refused(name: str, tmp_path: Path) -> None:
    write_index(tmp_path, {"a": name})
    refused(tmp_path).encode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        ('{"weight_map": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "too deeply"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "its weight_map is empty"),
        ('{"weight_map": {"a": 1}}', "expected a file name for tensor 'a', got 1"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "duplicate key"),
    ],
)
def test_a_broken_index_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text, encoding="utf-8")
    error = refused(tmp_path)
    assert error.startswith(str(tmp_path / INDEX))
    assert reason in error


def test_an_index_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b'{"weight_map": {"\xff": "x.safetensors"}}')
    assert "not valid JSON" in refused(tmp_path)


@pytest.mark.parametrize(("name", "limit"), [(INDEX, MAX_INDEX_BYTES), ("config.json", MAX_CONFIG_BYTES)])
def test_a_json_file_of_absurd_size_is_not_read(name: str, limit: int, tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "a")
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, limit + 1)
    assert f"has {limit + 1:,} bytes, more than the limit" in refused(tmp_path)


# ------------------------------------------------------------------------------------------- config.json


def test_config_json_is_given(sharded: Path) -> None:
    (sharded / "config.json").write_text('{"num_hidden_layers": 2, "time_step_limit": [0.0, Infinity]}')
    for path in (sharded, sharded / SHARDS[0], sharded / INDEX):
        config = open_checkpoint(path).config
        assert config is not None
        assert config["num_hidden_layers"] == 2


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_a_broken_config_json_is_refused(text: str, sharded: Path) -> None:
    (sharded / "config.json").write_text(text)
    assert refused(sharded).startswith(str(sharded / "config.json"))


def test_a_config_json_that_is_a_broken_link_is_refused(sharded: Path) -> None:
    (sharded / "config.json").symlink_to("../../blobs/abc")
    assert "is a broken link" in refused(sharded)


# ------------------------------------------------------------------------------------------- no weights


def test_a_missing_path(tmp_path: Path) -> None:
    error = refused(tmp_path / "model")
    assert error.endswith("there is no such directory or file here: check the path")


def test_a_hub_id_is_told_how_to_become_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(Path("meta-llama/Llama-3.2-1B"))
    assert "recipes name it by this id" in error
    assert "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B" in error


def test_a_path_that_no_system_has(tmp_path: Path) -> None:
    assert "can't be looked up" in refused(tmp_path / "a\0b")


def test_an_empty_directory(tmp_path: Path) -> None:
    assert "has no weights (it is empty)" in refused(tmp_path)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "has no weights (it holds 'config.json')" in refused(tmp_path)


def test_files_without_tensors(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors")
    assert "holds no tensors" in refused(tmp_path)


def test_the_hubs_cache_folder_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    assert "give one of the directories in" in refused(tmp_path)


def test_other_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "only 'model.gguf'" in refused(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_refused_with_how_to_convert_them(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    for path in (tmp_path, tmp_path / name):
        error = refused(path)
        assert f"pickles ('{name}')" in error
        assert "safe_serialization=True" in error
        assert f"{str(tmp_path)!r}" in error


def test_pickles_beside_safetensors_do_not_matter(sharded: Path) -> None:
    (sharded / "pytorch_model.bin").touch()
    (sharded / "training_args.bin").touch()
    assert list(open_checkpoint(sharded).tensors) == ["c", "a", "b"]


def test_what_a_training_run_leaves_is_not_taken_for_weights(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").touch()
    assert "has no weights" in refused(tmp_path)
