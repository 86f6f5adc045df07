"""Companion files are selected by name, and small files are copied atomically."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mergeloom.errors import CheckpointError, DiskSpaceError, EnvironmentFailure
from mergeloom.io.companions import FileKind, companion_files
from mergeloom.io.output.file_copy import copy_file
from tests.support.models.companions import OTHER, TOKENIZER


def write(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")


def listed(directory: Path, *kinds: FileKind) -> list[str]:
    return [file.path for file in companion_files(directory, kinds or tuple(FileKind))]


LEFT = """.gitattributes .git/config README.md config.json model.safetensors model-00001-of-00002.safetensors
    model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json training_args.bin optimizer.pt
    vocab.pkl vocab.bin tf_model.h5 onnx/model.onnx model.gguf consolidated.00.pth params.json trainer_state.json
    eval.py mergekit_config.yml mergeloom.json original/tokenizer.model data_config.json adapter_config.json
    rng_state_0.pth .mergeloom/tokenizer.json runs/events.out adapter_model.safetensors license.py
    chat_templates/evil.bin"""


def test_companions_are_selected_by_name(tmp_path: Path) -> None:
    tokenizer, generation, other = TOKENIZER.split(), ["generation_config.json"], OTHER.split()
    write(tmp_path, *tokenizer, *generation, *other, *LEFT.split())
    assert listed(tmp_path) == sorted(tokenizer + generation + other)
    assert listed(tmp_path, FileKind.TOKENIZER) == sorted(tokenizer)
    assert listed(tmp_path, FileKind.GENERATION) == generation
    assert listed(tmp_path, FileKind.OTHER) == sorted(other)


def test_real_encoder(encoder: Path) -> None:
    assert {file.path: file.kind.value for file in companion_files(encoder)} == {
        "1_Pooling/config.json": "other",
        "config_sentence_transformers.json": "other",
        "modules.json": "other",
        "sentence_bert_config.json": "other",
        "special_tokens_map.json": "tokenizer",
        "tokenizer.json": "tokenizer",
        "tokenizer_config.json": "tokenizer",
        "vocab.txt": "tokenizer",
    }
    assert all(file.nbytes == (encoder / file.path).stat().st_size for file in companion_files(encoder))


def test_modules_of_sentence_transformers(tmp_path: Path) -> None:
    paths = ["", "1_Pooling", "2_Dense", "../elsewhere", "/etc", "..", 3, None]
    write(
        tmp_path / "model", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "custom_st.py"
    )
    write(tmp_path / "elsewhere", "config.json")
    modules = [{"path": path, "type": "sentence_transformers.models.Pooling"} for path in paths]
    modules.append({"path": "3_Not_there", "type": "custom_st.Transformer"})
    (tmp_path / "model/modules.json").write_text(json.dumps(modules))
    assert listed(tmp_path / "model") == [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "custom_st.py",
        "modules.json",
    ]


def test_code_that_the_configs_name(tmp_path: Path) -> None:
    write(tmp_path, "unused.py", "../outside.py", "helper.py", "configuration_x.py", "tokenization_x.py", "both.py")
    (tmp_path / "modeling_x.py").write_text(
        "import os\nfrom .configuration_x import XConfig\nfrom . import helper\nfrom ..outside import y\n"
        "try:\n    from .not_there import z\nexcept ImportError:\n    pass\n"
    )
    (tmp_path / "tokenization_x.py").write_text("from .both import a")
    (tmp_path / "configuration_x.py").write_text("from .both import b\nfrom .modeling_x import c")  # a ring
    auto_map = {"AutoModel": "modeling_x.XModel", "AutoConfig": "org/repo--configuration_y.Y", "AutoZ": "../outside.Z"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert listed(tmp_path, FileKind.OTHER) == ["both.py", "configuration_x.py", "helper.py", "modeling_x.py"]
    assert listed(tmp_path, FileKind.TOKENIZER) == ["tokenization_x.py", "tokenizer_config.json"]


def test_links_of_the_hub_cache(tmp_path: Path) -> None:
    write(tmp_path, "blobs/0a1b", "other/chat.jinja")
    snapshot = tmp_path / "snapshots/main"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0a1b")
    (snapshot / "chat_templates").symlink_to("../../other")
    (snapshot / "vocab.txt").symlink_to(".", target_is_directory=True)  # a ring
    assert listed(snapshot) == ["tokenizer.json"]
    (snapshot / "merges.txt").symlink_to("../../blobs/gone")
    with pytest.raises(CheckpointError, match=r"merges\.txt.*download it again"):
        companion_files(snapshot)


def test_large_files_and_directories_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "vocab.json/x", "merges.txt")
    with (tmp_path / "tokenizer.model").open("wb") as stream:
        stream.truncate((1 << 30) + 1)
    assert listed(tmp_path) == ["merges.txt"]
    assert companion_files(tmp_path, largest=1) == ()


def test_a_pipe_is_rejected_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a regular file, expected a file"):
        companion_files(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "modules.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_broken_json(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: is not valid JSON"):
        companion_files(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"auto_map": [1]}', '{"auto_map": {"a": {"b": 1}}}', '["x", {}]']
)
def test_odd_json(tmp_path: Path, content: str) -> None:
    for name in ("config.json", "tokenizer_config.json", "modules.json"):
        (tmp_path / name).write_text(content)
    assert listed(tmp_path) == ["modules.json", "tokenizer_config.json"]


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone"):
        companion_files(tmp_path / "gone")


def test_copy(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    source, target = tmp_path / "source", tmp_path / "out/1_Pooling/target"
    source.write_bytes(data)
    assert copy_file(source, target) == len(data)
    assert target.read_bytes() == data
    assert list(target.parent.iterdir()) == [target]
    source.write_bytes(b"new")
    copy_file(source, target)
    assert target.read_bytes() == b"new"
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, DiskSpaceError), (errno.EDQUOT, DiskSpaceError), (errno.EIO, EnvironmentFailure)],
)
def test_a_failed_copy_leaves_the_target_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new")
    target.write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("mergeloom.io.output.file_copy.sync_data", fail)
    with pytest.raises(error, match="copying .*source"):
        copy_file(source, target)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_copying_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone: there is no such file"):
        copy_file(tmp_path / "gone", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []
