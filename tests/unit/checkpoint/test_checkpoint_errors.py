"""Damaged checkpoints are rejected with errors that name the file and the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mergeloom.io.checkpoint.checkpoint import MAX_CONFIG_BYTES, open_checkpoint
from mergeloom.io.checkpoint.index import MAX_INDEX_BYTES
from tests.unit.checkpoint.checkpoints import INDEX, SHARDS, refused, write, write_index

# ------------------------------------------------------------------------------------------- index against shards


def test_a_tensor_that_its_shard_lacks_is_an_error_that_names_both(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0], "d": SHARDS[1]})
    error = refused(sharded)
    assert f"tensor 'd' is in '{SHARDS[1]}', which doesn't contain it:" in error


def test_a_tensor_in_another_shard_than_the_index_says_is_an_error_that_names_it(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[1], "b": SHARDS[1], "c": SHARDS[0]})
    error = refused(sharded)
    assert f"tensor 'a' is in '{SHARDS[1]}', which doesn't contain it; it is in '{SHARDS[0]}' instead" in error


def test_an_unlisted_tensor_is_used_with_a_remark(sharded: Path) -> None:
    write_index(sharded, {"a": SHARDS[0], "b": SHARDS[1]})
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.tensors) == ["c", "a", "b"]
    assert any("doesn't list 'c'" in remark for remark in checkpoint.remarks)


def test_of_two_copies_the_listed_one_is_used_with_a_remark(sharded: Path) -> None:
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
    assert "leads out of the model's directory" in refused(model)


@pytest.mark.parametrize("name", ["", ".", "x", "x.json", "x.safetensors/"])
def test_a_shard_name_that_is_no_safetensors_file_is_refused(name: str, tmp_path: Path) -> None:
    write_index(tmp_path, {"a": name})
    assert "which is not a .safetensors file" in refused(tmp_path)


def test_an_index_that_names_pickles_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "pytorch_model.bin"})
    assert "'pytorch_model.bin' as the file of tensor 'a', which is not a .safetensors file" in refused(tmp_path)


@pytest.mark.parametrize("name", ["\ud800.safetensors", "x" * 300 + ".safetensors"], ids=["surrogate", "too long"])
def test_an_invalid_shard_name_is_refused(name: str, tmp_path: Path) -> None:
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
    assert error.endswith("there is no such directory or file: check the path")


def test_a_hub_id_is_told_how_to_become_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(Path("meta-llama/Llama-3.2-1B"))
    assert "recipes can use this id" in error
    assert "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B" in error


def test_an_invalid_path(tmp_path: Path) -> None:
    assert "can't be looked up" in refused(tmp_path / "a\0b")


def test_an_empty_directory(tmp_path: Path) -> None:
    assert "has no weights (it is empty)" in refused(tmp_path)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "has no weights (it contains 'config.json')" in refused(tmp_path)


def test_files_without_tensors(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors")
    assert "contains no tensors" in refused(tmp_path)


def test_the_hubs_cache_folder_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    assert "use one of the directories in" in refused(tmp_path)


def test_other_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "has 'model.gguf'" in refused(tmp_path)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_of_other_names_are_used_by_their_path_only(name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    error = refused(tmp_path)
    assert f"has '{name}', whose names don't say whether they are the weights" in error
    assert "use the path of the right file" in error
    assert list(open_checkpoint(tmp_path / name).tensors) == ["a"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_a_pipe_is_not_opened(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)  # reading it would wait for ever
    for path in (tmp_path, tmp_path / name):
        assert "is not a regular file" in refused(path)


def test_pickles_next_to_safetensors_are_ignored(sharded: Path) -> None:
    (sharded / "pytorch_model.bin").touch()
    (sharded / "training_args.bin").touch()
    assert list(open_checkpoint(sharded).tensors) == ["c", "a", "b"]


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"])
def test_pickles_of_a_training_run_are_not_weights(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    assert "has no weights" in refused(tmp_path)
    assert "is a part of the state of a training run" in refused(tmp_path / name)
