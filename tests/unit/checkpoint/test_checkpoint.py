"""Checkpoints are found in all layouts that models come in, and other files are left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from tests.unit.checkpoint.checkpoints import INDEX, SHARDS, file_names, refused, write, write_index

# ------------------------------------------------------------------------------------------- layouts


def test_a_directory_with_an_index(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.path == sharded
    assert file_names(checkpoint) == list(SHARDS)
    assert checkpoint.tensors["b"].file == sharded / SHARDS[1]
    assert (checkpoint.config, checkpoint.ignored, checkpoint.remarks) == (None, (), ())


def test_tensors_are_ordered_by_file_and_offset(sharded: Path) -> None:
    assert list(open_checkpoint(sharded).tensors) == ["c", "a", "b"]


def test_an_index_given_by_its_path(sharded: Path) -> None:
    assert list(open_checkpoint(sharded / INDEX).tensors) == ["c", "a", "b"]


def test_an_index_of_another_name(tmp_path: Path) -> None:
    write(tmp_path / "part.safetensors", "a")
    write_index(tmp_path, {"a": "part.safetensors"}, "diffusion.safetensors.index.json")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_the_index_named_model_is_preferred(sharded: Path) -> None:
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


@pytest.mark.parametrize(
    ("name", "standalone"),
    [
        ("model.safetensors", False),
        ("model.fp16.safetensors", False),
        ("diffusion_pytorch_model.safetensors", False),
        ("model-00001-of-00002.safetensors", False),
        ("my_model.safetensors", True),
        ("modelA.safetensors", True),
        ("v1-5-pruned-emaonly.safetensors", True),
    ],
)
def test_a_file_stands_alone_unless_loaders_find_it_next_to_a_config(
    name: str, standalone: bool, tmp_path: Path
) -> None:
    file = write(tmp_path / name, "a")
    assert open_checkpoint(file).standalone
    assert open_checkpoint(file).remarks == ()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(file)
    assert (checkpoint.standalone, checkpoint.config is None) == (standalone, standalone)
    remarks = [f"a file stands alone, so config.json next to {name} is not used: if it belongs to the model, give the "]
    assert [remark[: len(remarks[0])] for remark in checkpoint.remarks] == (remarks if standalone else [])
    write(tmp_path / "zzz.safetensors", "b")  # then the config.json hardly belongs to one of the files
    assert open_checkpoint(file).remarks == ()
    if "-of-" not in name:
        assert not open_checkpoint(tmp_path).standalone


def test_weights_of_diffusers_are_chosen_among_their_variants(tmp_path: Path) -> None:
    file = write(tmp_path / "diffusion_pytorch_model.safetensors", "a")
    variant = write(tmp_path / "diffusion_pytorch_model.fp16.safetensors", "a")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.files, checkpoint.ignored) == ((file,), (variant,))


def test_a_pipeline_of_diffusers_is_refused_with_its_parts(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for name in ("unet", "vae"):
        write(tmp_path / name / "diffusion_pytorch_model.safetensors", "a")
    assert "is a pipeline of diffusers, whose parts are models of their own: merge them one by one ('unet', 'vae')" in (
        refused(tmp_path)
    )


def test_a_single_file_of_any_name(tmp_path: Path) -> None:
    assert list(open_checkpoint(write(tmp_path / "blobs" / "abc", "a")).tensors) == ["a"]


def test_several_files_without_an_index_are_merged(tmp_path: Path) -> None:
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


def test_model_safetensors_is_preferred_without_an_index(tmp_path: Path) -> None:
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


def test_many_shards_are_in_order(tmp_path: Path) -> None:
    names = [f"model-{number:05}-of-00191.safetensors" for number in range(1, 192)]
    for name in names:
        write(tmp_path / name, f"of {name}")
    write_index(tmp_path, {f"of {name}": name for name in reversed(names)})
    checkpoint = open_checkpoint(tmp_path)
    assert file_names(checkpoint) == names
    assert list(checkpoint.tensors) == [f"of {name}" for name in names]


# ------------------------------------------------------------------------------------------- ignored files


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


def test_consolidated_weights_are_ignored_without_an_index(tmp_path: Path) -> None:
    for name in ("a", "b", "consolidated.00", "adapter_model"):
        write(tmp_path / f"{name}.safetensors", name)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert [file.name for file in checkpoint.ignored] == ["adapter_model.safetensors", "consolidated.00.safetensors"]


def test_consolidated_weights_alone_are_the_model(tmp_path: Path) -> None:
    write(tmp_path / "consolidated.safetensors", "a")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", "a")
    (tmp_path / "._a.safetensors").write_bytes(b"\0\5\26\7")
    assert open_checkpoint(tmp_path).ignored == ()


def test_an_index_wins_over_a_model_safetensors_that_it_does_not_name(sharded: Path) -> None:
    other = write(sharded / "model.safetensors", "z")
    checkpoint = open_checkpoint(sharded)
    assert "z" not in checkpoint.tensors
    assert checkpoint.ignored == (other,)
