"""The documented rules: files without tokenizer.json, special ids, vectors, stages, quantized embeddings, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer

from mergeloom.engine.run.manifest import facts_of
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import CheckpointError, RecipeError
from tests.support.outputs import config_of, read_model
from tests.support.vocabularies.expected import EMBEDDING, HEAD
from tests.support.vocabularies.pairs import SPECIAL, byte_level, reordered, with_tokens, word_piece, write_model

CPU = Options(device="cpu", threads=1)


def linear(*models: Path | str, **more: Any) -> dict[str, Any]:
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": entries, "base_model": str(models[0]), "dtype": "float32", **more}


UNION = {"tokenizer": {"source": "union"}}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    a = write_model(tmp_path / "a", byte_level(), 1)
    return a, write_model(tmp_path / "b", with_tokens(byte_level(), SPECIAL, "<y>"), 2)


def test_a_wordpiece_tokenizer_with_vocab_txt_only(tmp_path: Path) -> None:
    tokenizer = word_piece()
    a = write_model(tmp_path / "a", tokenizer, 1)
    b = write_model(tmp_path / "b", with_tokens(tokenizer, "<y>"), 2)
    tokens = Tokenizer.from_file(str(a / "tokenizer.json")).get_vocab()
    (a / "tokenizer.json").unlink()
    (a / "vocab.txt").write_text("\n".join(sorted(tokens, key=tokens.__getitem__)) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "mask_token": "[MASK]", "pad_token": "<s>"}
    settings |= {"cls_token": "<s>", "sep_token": "</s>"}
    (a / "tokenizer_config.json").write_text(json.dumps(settings))
    merge(linear(a, b, **UNION), tmp_path / "out", CPU)
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (a / "vocab.txt").read_bytes()
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.get_vocab() == {**tokens, "<y>": len(tokens)}
    made, lent = read_model(tmp_path / "out"), read_model(b)
    assert torch.equal(made[EMBEDDING][len(tokens)], lent[EMBEDDING][len(tokens)])


def test_a_byte_level_tokenizer_with_vocab_json_only(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", byte_level(first=()), 1, rows=320)
    b = write_model(tmp_path / "b", with_tokens(byte_level(first=()), SPECIAL), 2)
    content = json.loads((a / "tokenizer.json").read_text())["model"]
    (a / "tokenizer.json").unlink()
    (a / "vocab.json").write_text(json.dumps(content["vocab"]))
    (a / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in content["merges"]) + "\n")
    (a / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "!"}))
    (a / "added_tokens.json").write_text("{}")
    merge(linear(a, b, **UNION), tmp_path / "out", CPU)
    assert json.loads((tmp_path / "out" / "added_tokens.json").read_text()) == {"<|im_start|>": 300}
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.convert_tokens_to_ids("<|im_start|>") == 300
    assert len(read_model(tmp_path / "out")[EMBEDDING]) == 320


def test_a_sentencepiece_model_only(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"▁word{number}" for number in range(20))]
    a = write_model(tmp_path / "a", byte_level(), 1, rows=23)
    b = write_model(tmp_path / "b", byte_level(), 2, rows=24)
    for path in (a, b):
        (path / "tokenizer.json").unlink()
        messages = (b"\x0a" + bytes([len(piece.encode())]) + piece.encode() for piece in pieces)
        (path / "tokenizer.model").write_bytes(b"".join(b"\x0a" + bytes([len(each)]) + each for each in messages))
    (b / "added_tokens.json").write_text(json.dumps({"<y>": 23}))
    merge(linear(a, b, **UNION), tmp_path / "out", CPU)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (a / "tokenizer.model").read_bytes()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["added_tokens_decoder"]["23"]["content"] == "<y>"
    made = read_model(tmp_path / "out")
    assert torch.equal(made[EMBEDDING][23], read_model(b)[EMBEDDING][23])


def test_special_ids_follow_their_tokens(tmp_path: Path) -> None:
    """All ids of config.json and generation_config.json, in the vocabulary of another model without such files."""
    a = write_model(tmp_path / "a", with_tokens(byte_level(), "<end>"), 1)
    b = write_model(tmp_path / "b", with_tokens(byte_level(first=("<pad>", "<s>", "</s>")), "<x>", "<end>"), 2)
    ids = {"eos_token_id": [1, 300], "decoder_start_token_id": 0}
    for file in ("config.json", "generation_config.json"):
        (a / file).write_text(json.dumps({**json.loads((a / file).read_text()), **ids}))
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.endswith("token_id")}))
    (b / "generation_config.json").unlink()
    merge(linear(a, b, tokenizer_source=str(b)), tmp_path / "out", CPU)
    rows = Tokenizer.from_file(str(b / "tokenizer.json")).get_vocab()
    for content in (config_of(tmp_path / "out"), json.loads((tmp_path / "out/generation_config.json").read_text())):
        assert content["eos_token_id"] == [rows["</s>"], rows["<end>"]]
        assert content["decoder_start_token_id"] == content["bos_token_id"] == rows["<s>"]


def test_the_bias_of_a_head_has_the_same_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    biases = []
    for path in pair:
        tensors = read_model(path)
        bias = torch.randn(len(tensors[HEAD]))
        save_file({**tensors, "lm_head.bias": bias}, path / "model.safetensors", {"format": "pt"})
        biases.append(bias)
    merge(linear(*pair, **UNION), tmp_path / "out", CPU)
    made = read_model(tmp_path / "out")["lm_head.bias"]
    wanted = torch.cat([(biases[0] + biases[1][:300]) / 2, biases[1][300:]])
    rows = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    order = torch.tensor([*range(300), rows["<|im_start|>"], rows["<y>"]])
    assert torch.allclose(made[order], wanted, rtol=1e-6, atol=1e-7)


def test_a_tensor_that_may_have_a_row_for_each_token_is_rejected(pair: tuple[Path, Path]) -> None:
    for path, rows in zip(pair, (300, 302), strict=True):
        tensors = read_model(path)
        save_file({**tensors, "model.table": torch.zeros(rows, 5)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensor model.table of .*a has the shape \[300, 5\], a row for each"):
        plan(linear(*pair, **UNION), CPU)


def test_quantized_embeddings_are_rejected_by_name(pair: tuple[Path, Path]) -> None:
    tensors = read_model(pair[1])
    tensors[EMBEDDING] = tensors[EMBEDDING].to(torch.float8_e4m3fn)
    save_file(tensors, pair[1] / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="embed_tokens.weight of .*b is stored as F8_E4M3: rows of quantized"):
        plan(linear(*pair, **UNION), CPU)


def test_different_dtypes_are_promoted(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", byte_level(), 1, dtype="BF16")
    b = write_model(tmp_path / "b", with_tokens(byte_level(), "<y>"), 2, dtype="F16")
    merge({**linear(a, b, **UNION), "dtype": None}, tmp_path / "out", CPU)
    made = read_model(tmp_path / "out")[EMBEDDING]
    assert made.dtype == torch.float32
    assert torch.equal(made[300], read_model(b)[EMBEDDING][300].float())


def test_a_stage_whose_rows_would_have_to_move(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    a2 = write_model(tmp_path / "a2", byte_level(), 3)
    first = {"name": "first", **linear(a, a2)}
    with pytest.raises(RecipeError, match="embeddings of stage `first` would be rearranged.* write the same tokenizer"):
        plan([first, linear("first", b, **UNION)], CPU)
    rows = rf"{a} lacks rows that it would take from the output of stage `first`.*: merge stage `first` on its own"
    with pytest.raises(RecipeError, match=rows):  # the same tokenizer in `first` would not help
        plan([{"name": "first", **linear(b, b)}, linear("first", a, **UNION)], CPU)
    stages = [{"name": "first", **linear(a, a2, b, tokenizer={"source": str(b)})}, linear("first", b)]
    assert plan(stages, CPU).built.vocabulary is None
    union = {"name": "first", **linear(a, b, **UNION)}  # its tokens are those of b
    merge([union, linear("first", b)], tmp_path / "out", CPU)
    assert plan([union, linear("first", b)], CPU).warnings == ()
    loaded = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert loaded.get_vocab() == Tokenizer.from_file(str(b / "tokenizer.json")).get_vocab()


def test_a_tokenizer_and_allow_vocabulary_mismatch_contradict_each_other(pair: tuple[Path, Path]) -> None:
    message = "merges embeddings row by row, and these have 300 and 302 rows: remove it to merge them token by token"
    with pytest.raises(RecipeError, match=message):
        plan(linear(*pair, **UNION, allow_vocabulary_mismatch=True), CPU)


def test_files_from_a_model_with_the_output_s_rows_or_others(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    for source in (a, b):
        result = merge(linear(a, b, **UNION, files_from=str(source)), tmp_path / f"of-{source.name}", CPU)
        assert not [warning for warning in result.plan.warnings if "vocab_size" in warning]
        assert config_of(tmp_path / f"of-{source.name}")["vocab_size"] == 302


def test_equal_tokens_with_different_padding_need_no_key(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a", byte_level(), 1, rows=304)
    b = write_model(tmp_path / "b", byte_level(), 2, rows=384)
    result = merge(linear(a, b), tmp_path / "out", CPU)
    made, one, other = (read_model(path)[EMBEDDING] for path in (tmp_path / "out", a, b))
    assert torch.equal(made[304:], other[304:])
    assert torch.allclose(made[:304], (one + other[:304]) / 2, rtol=1e-6, atol=1e-9)
    assert result.plan.to_dict()["vocabulary"]["models"][0]["padding"] == 84
    assert config_of(tmp_path / "out")["vocab_size"] == 384


def test_other_rows_are_another_merge(tmp_path: Path) -> None:
    """A merge is not resumed with a tokenizer that gives the same union, but other rows of a model."""
    a = write_model(tmp_path / "a", byte_level(), 1)
    b = write_model(tmp_path / "b", with_tokens(reordered(byte_level(), 3), "<y>"), 2)
    before = facts_of(plan(linear(a, b, **UNION), CPU))["outputs"]
    with_tokens(reordered(byte_level(), 4), "<y>").save(str(b / "tokenizer.json"))
    assert facts_of(plan(linear(a, b, **UNION), CPU))["outputs"] != before


def test_ids_with_gaps_cannot_be_appended_to(pair: tuple[Path, Path]) -> None:
    content = json.loads((pair[0] / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 310, "content": "<late>"})
    (pair[0] / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"numbers 301 tokens up to 310, .* new tokens"):
        plan(linear(*pair, **UNION), CPU)


def test_a_model_without_a_tokenizer_has_that_of_the_tokenizers_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    c = write_model(tmp_path / "c", byte_level(), 3)
    (c / "tokenizer.json").unlink()
    tokenizer = {"source": "base", "pad_to_multiple_of": 64}
    (warning,) = plan(linear(a, b, c, tokenizer=tokenizer), CPU).warnings
    assert (
        warning == f"{c} has no tokenizer files: its vocabulary is assumed to be that of {a}; add the tokenizer files"
    )
    (b / "tokenizer.json").unlink()
    with pytest.raises(
        CheckpointError, match="b has no tokenizer files, so its vocabulary is unknown, and .* have 302"
    ):
        plan(linear(a, c, b, tokenizer=tokenizer), CPU)


def test_tokens_stored_as_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """They are compared among themselves. They can't be compared with text, and no tokens can be added to them."""
    a, b = pair
    for path, lines in ((a, "YQ== 0\nYg== 1\n"), (b, "Yg== 0\nYQ== 1\nYw== 2\n")):
        (path / "tokenizer.json").rename(path / "kept.json")
        (path / "qwen.tiktoken").write_text(lines)
    planned = plan(linear(a, b, tokenizer_source="base"), CPU)
    assert planned.built.vocabulary is not None
    assert list(planned.built.vocabulary.models[1].same)[:2] == [1, 0]
    with pytest.raises(CheckpointError, match="a: tokens can't be added to qwen.tiktoken, whose tokens are bytes"):
        plan(linear(a, b, **UNION), CPU)
    (b / "qwen.tiktoken").unlink()
    (b / "kept.json").rename(b / "tokenizer.json")
    with pytest.raises(
        CheckpointError, match=r"a has qwen.tiktoken and .*b has tokenizer.json, which cannot be compared"
    ):
        plan(linear(a, b, tokenizer_source="base"), CPU)
