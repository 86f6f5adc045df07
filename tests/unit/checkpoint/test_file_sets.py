"""Weight files without an index are complete and belong together, or their directory is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeloom.errors import CheckpointError
from mergeloom.io.checkpoint.checkpoint import open_checkpoint
from mergeloom.io.checkpoint.file_sets import check_file_set, shard_number, unlisted_shards
from tests.unit.checkpoint.checkpoints import INDEX, file_names, refused, write, write_index


def names(prefix: str, *numbers: int, total: int = 3, suffix: str = ".safetensors") -> list[str]:
    return [f"{prefix}-{number:05}-of-{total:05}{suffix}" for number in numbers]


COMPLETE = {
    "one": ["weights.safetensors"],
    "one of one": names("model", 1, total=1),
    "three": names("model", 1, 2, 3),
    "from zero": names("consolidated", 0, 1, 2),
    "a variant": names("model", 1, 2, 3, suffix=".fp16.safetensors"),
    "without zeros": ["model-1-of-2.safetensors", "model-2-of-2.safetensors"],
    "underscores": ["model_00001_of_00002.safetensors", "model_00002_of_00002.safetensors"],
    "a checkpoint of a training run": ["lora_epoch_3_of_10.safetensors"],
    "the same with hyphens": ["model-step-100-of-500.safetensors"],
    "no separator": ["model-1of2.safetensors"],
}


@pytest.mark.parametrize("files", COMPLETE.values(), ids=COMPLETE)
def test_a_complete_set_is_accepted_without_a_warning(files: list[str]) -> None:
    assert check_file_set("a", files) == []


INCOMPLETE = {
    "last": (names("model", 1, total=2), "'model-00001-of-00002.safetensors' is one of 2 files, of which only 1 exist: "
             "'model-00002-of-00002.safetensors' missing"),
    "first": (names("model", 2, 3), "'model-00001-of-00003.safetensors' missing"),
    "middle, from zero": (names("part", 0, 2), "'part-00001-of-00003.safetensors' missing"),
    "of a variant": (names("m", 1, 2, suffix=".fp16.safetensors"), "'m-00003-of-00003.fp16.safetensors' missing"),
    "without zeros": (["model-2-of-2.safetensors"], "'model-1-of-2.safetensors' missing"),
    "underscores": (["model_00001_of_00002.safetensors"], "'model_00002_of_00002.safetensors' missing"),
    "dots": (["model.1.of.2.safetensors"], "'model.2.of.2.safetensors' missing"),
    "capitals": (["PART_1_OF_2.safetensors"], "'PART_2_OF_2.safetensors' missing"),
    "a part": (["model_part_2_of_2.safetensors"], "'model_part_1_of_2.safetensors' missing"),
    "very many": (names("model", 1, total=99999), "'model-00005-of-99999.safetensors' and others missing"),
    "another file is there": (["extra.safetensors", *names("m", 1, 2)], "'m-00003-of-00003.safetensors' missing"),
    "numbers beyond the total": (names("m", 1, 2, 3, 4), "has 4 files like 'm-00001-of-00003.safetensors', which st"),
    "two versions": ([*names("model", 1, 2, total=2), *names("model", 1, 2, 3)], "has files of different sets"),
    "two spellings": (["m-1-of-2.safetensors", "m-01-of-2.safetensors"], "has files of different sets"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "error"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_an_incomplete_or_mixed_set_is_rejected(files: list[str], error: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_file_set("some/model", files)
    assert str(caught.value).startswith("some/model: has ")
    assert error in str(caught.value)


def test_files_that_state_no_total_are_used_with_a_warning() -> None:
    (remark,) = check_file_set("a", ["a.safetensors", "b.safetensors"])
    assert remark.startswith("no index lists the files of the model, so 'a.safetensors', 'b.safetensors' are all used")
    assert len(check_file_set("a", [*names("model", 1, 2, 3), "extra.safetensors"])) == 1


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model-00001-of-00002.safetensors", (1, 2)),
        ("m_3_of_4.safetensors", (3, 4)),
        ("model.safetensors", None),
        ("one-of-us.safetensors", None),
        ("step_3_of_4.safetensors", None),
    ],
)
def test_the_number_of_a_shard(name: str, number: tuple[int, int] | None) -> None:
    assert shard_number(name) == number


@pytest.mark.parametrize("form", ["model-{:05}-of-{:05}.safetensors", "model_{}_of_{}.safetensors"])
def test_an_index_that_does_not_list_all_shards_is_a_warning(form: str, tmp_path: Path) -> None:
    first = form.format(1, 2)
    write(tmp_path / first, "a")
    write_index(tmp_path, {"a": first})
    (remark,) = open_checkpoint(tmp_path).remarks
    assert remark.startswith(
        f"{INDEX} lists only 1 of 2 files: '{first}'. If the other files have tensors of the model"
    )
    write(tmp_path / form.format(2, 2), "b")
    (remark,) = open_checkpoint(tmp_path).remarks
    assert remark.startswith(f"{INDEX} lists only 1 of 2 files")
    write_index(tmp_path, {"a": first, "b": form.format(2, 2)})
    assert open_checkpoint(tmp_path).remarks == ()


@pytest.mark.parametrize(
    "shards",
    [
        names("model", 0, 1, 2),
        ["model.safetensors"],
        ["weights.safetensors", "embeddings.safetensors"],
        [*names("model", 1, 2, total=2), *names("vision", 1, total=1)],
        ["model-step-1-of-3.safetensors"],
    ],
)
def test_a_complete_index_is_no_warning(shards: list[str]) -> None:
    assert unlisted_shards(INDEX, shards) == []


def test_a_directory_whose_last_shard_is_missing_is_rejected(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert file_names(open_checkpoint(sharded)) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    (sharded / "model-00002-of-00002.safetensors").unlink()
    error = refused(sharded)
    assert error.startswith(f"{sharded}: has no index")
    assert "download the missing files" in error


def test_a_set_of_consolidated_files_is_checked_too(tmp_path: Path) -> None:
    write(tmp_path / "consolidated-00001-of-00002.safetensors", "a")
    assert "'consolidated-00002-of-00002.safetensors' missing" in refused(tmp_path)


def test_an_incomplete_set_next_to_a_single_file_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "a")
    stale = write(tmp_path / "model-00001-of-00002.safetensors", "b")
    checkpoint = open_checkpoint(tmp_path)
    assert (list(checkpoint.tensors), checkpoint.ignored, checkpoint.remarks) == (["a"], (stale,), ())


# ------------------------------------------------------------------------------------------- stray files


def test_a_single_file_that_transformers_prefers_to_the_index_is_a_warning(sharded: Path) -> None:
    write(sharded / "model.safetensors", "z")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.index == sharded / INDEX
    (remark,) = checkpoint.remarks
    assert remark.startswith(f"model.safetensors is not in {INDEX} and is not used, but transformers loads it instead")


@pytest.mark.parametrize("main", ["index", "single"])
def test_an_adapter_that_transformers_applies_is_a_warning(main: str, sharded: Path) -> None:
    if main == "single":
        (sharded / INDEX).unlink()
        write(sharded / "model.safetensors", "a")
    write(sharded / "adapter_model.safetensors", "z")
    (remark,) = open_checkpoint(sharded).remarks
    assert remark.startswith(
        "'adapter_model.safetensors' is an adapter, which is not applied, but transformers applies"
    )


@pytest.mark.parametrize(
    "stray", ["consolidated.safetensors", "model-00003-of-00003.safetensors", "v_head.safetensors"]
)
def test_other_stray_files_are_no_warning(stray: str, sharded: Path) -> None:
    file = write(sharded / stray, "z")
    checkpoint = open_checkpoint(sharded)
    assert (checkpoint.ignored, checkpoint.remarks) == ((file,), ())


def test_pickles_of_an_adapter_are_called_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    error = refused(tmp_path)
    assert "is an adapter ('adapter_model.bin'), not a model" in error
    assert "merge_and_unload" in error
