"""Tensors are paired by name; what can't be compared is listed, and models without plain values are rejected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeloom.engine.run.diff.compare import Comparison
from mergeloom.engine.run.diff.result import NotCompared
from mergeloom.errors import CheckpointError
from tests.support.models import write_checkpoint
from tests.unit.diff.references import compare, is_close, reference

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rows(seed: int, *shape: int) -> Tensor:
    """Random values."""
    return torch.randn(shape or (6, 4), generator=torch.Generator().manual_seed(seed))


def refused(directory: Path, tensors: Mapping[str, Tensor], *, config: dict[str, object] | None = None) -> str:
    """Compare a model with a plain one, in both orders; return the error."""
    model = write_checkpoint(directory / "model", tensors, config=config)
    plain = write_checkpoint(directory / "plain", {"w": torch.ones(2)})
    errors = set()
    for a, b in ((model, plain), (plain, model)):
        with pytest.raises(CheckpointError) as caught:
            Comparison(a, b)
        errors.add(str(caught.value))
    assert len(errors) == 1
    return errors.pop()


# ------------------------------------------------------------------------------------------------ lists


def test_tensors_of_one_model_and_other_shapes_are_listed(tmp_path: Path) -> None:
    a = {"same": rows(0), "wider": rows(1, 2, 3), "own.a": rows(2), "complex": torch.ones(2, dtype=torch.complex64)}
    b = {"same": rows(3), "wider": rows(1, 3, 2), "own.b": rows(2), "own.c": rows(2)}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    found = compare(tmp_path, {name: a[name] for name in a if name != "complex"}, b)
    assert [tensor.name for tensor in found.tensors] == ["same"]
    assert found.only_in_a == ("own.a",)
    assert found.only_in_b == ("own.b", "own.c")
    assert found.not_compared == (NotCompared("wider", "shape [2, 3] in A, [3, 2] in B"),)
    assert not found.equal
    assert found.bytes_read == 2 * 6 * 4 * 4


def test_a_missing_tensor_is_a_difference(tmp_path: Path) -> None:
    assert not compare(tmp_path, {"w": rows(0), "v": rows(1)}, {"w": rows(0)}).equal


def test_packed_values_without_a_scale_are_listed(tmp_path: Path) -> None:
    for name in "ab":
        shapes = {"w": (4, 4), "packed": (4, 4)}
        write_checkpoint(tmp_path / name, shapes, dtype={"w": "BF16", "packed": "F4"}, fill=None)
    found = Comparison(tmp_path / "a", tmp_path / "b").run()
    assert found.not_compared == (NotCompared("packed", "dtype F4 in A, F4 in B"),)


def test_models_without_a_common_name_are_rejected(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", {"model.norm.weight": rows(0)})
    b = write_checkpoint(tmp_path / "b", {"norm.weight": rows(0)})
    with pytest.raises(CheckpointError, match="have no tensor name in common") as caught:
        Comparison(a, b)
    assert "'model.norm.weight'" in str(caught.value)
    assert "'norm.weight'" in str(caught.value)


# ------------------------------------------------------------------------------------------------ tied heads


def test_a_head_is_compared_with_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    a, b = {EMBEDDING: rows(0), HEAD: rows(1)}, {EMBEDDING: rows(2)}
    for first, second, other in ((a, b, (rows(1), rows(2))), (b, a, (rows(0 + 2), rows(1)))):
        found = compare(tmp_path / str(len(first)), first, second)
        heads = {tensor.name: tensor for tensor in found.tensors}
        assert heads.keys() == {EMBEDDING, HEAD}
        assert heads[HEAD].tied_to == EMBEDDING
        assert heads[EMBEDDING].tied_to == ""
        assert is_close(heads[HEAD].similarity, reference(*other))
        assert is_close(heads[EMBEDDING].similarity, reference(first[EMBEDDING], second[EMBEDDING]))
        assert not found.only_in_a
        assert not found.only_in_b
        assert found.bytes_read == 3 * 6 * 4 * 4  # the embedding is read once for both


def test_a_head_is_not_compared_where_the_config_says_it_is_not_tied(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", {EMBEDDING: rows(0), HEAD: rows(1)})
    for name, config in (("b", {"tie_word_embeddings": False}), ("c", {"text_config": {"tie_word_embeddings": False}})):
        b = write_checkpoint(tmp_path / name, {EMBEDDING: rows(0), "score.weight": rows(1)}, config=config)
        found = Comparison(a, b).run()
        assert [tensor.name for tensor in found.tensors] == [EMBEDDING]
        assert found.only_in_a == (HEAD,)
        assert found.only_in_b == ("score.weight",)


# ------------------------------------------------------------------------------------------------ layers and kinds


def test_tensors_are_grouped_by_layer_and_kind(tmp_path: Path) -> None:
    names = [f"model.layers.{n}.mlp.experts.{e}.up.weight" for n in range(12) for e in range(2)]
    names += [f"vision.blocks.{n}.qkv.weight" for n in range(2)] + ["model.norm.weight", "classifier.0.weight"]
    a, b = ({name: rows(seed + n, 3, 3) for n, name in enumerate(names)} for seed in (0, 1000))
    for name, model in (("a", a), ("b", b)):
        write_checkpoint(tmp_path / name, model, config={"num_hidden_layers": 12})
    found = Comparison(tmp_path / "a", tmp_path / "b").run()
    layers = found.by_layer()
    model_layers = [group for group in layers if group.stack == "model.layers"]
    assert [group.layer for group in model_layers] == list(range(12))
    assert {group.tensors for group in model_layers} == {2}
    assert [group.layer for group in layers if group.stack == "vision.blocks"] == [0, 1]
    assert (layers[-1].layer, layers[-1].tensors) == (None, 2)
    third = [name for name in names if name.startswith("model.layers.3.")]
    expected = reference(*(torch.cat([model[name] for name in third]) for model in (a, b)))
    assert is_close(model_layers[3].similarity, expected)
    kinds = {group.kind: group for group in found.by_kind()}
    assert {kind: group.tensors for kind, group in kinds.items()} == {
        "model.layers.*.mlp.experts.*.up.weight": 24,
        "vision.blocks.*.qkv.weight": 2,
        "model.norm.weight": 1,
        "classifier.*.weight": 1,
    }
    expected = reference(*(torch.cat([model[name] for name in names[:24]]) for model in (a, b)))
    assert is_close(kinds["model.layers.*.mlp.experts.*.up.weight"].similarity, expected)


def test_layers_that_do_not_fit_the_config_are_no_obstacle(tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.w": rows(n) for n in range(3)}
    for name in "ab":
        write_checkpoint(tmp_path / name, tensors, config={"num_hidden_layers": 7})
    found = Comparison(tmp_path / "a", tmp_path / "b").run()
    assert found.equal
    assert [group.layer for group in found.by_layer()] == [None]


# ------------------------------------------------------------------------------------------------ rejected


def test_quantized_models_are_rejected(tmp_path: Path) -> None:
    error = refused(tmp_path, {"w.weight": torch.ones(4, 4).to(torch.int8), "w.SCB": torch.ones(4)})
    assert "model is quantized: 2 tensors ('w.weight': w.SCB is its scale)" in error
    assert "use a bfloat16 version" in error


def test_a_model_in_fp8_is_compared_by_its_values(tmp_path: Path) -> None:
    codes, scales = rows(0, 256, 130).to(torch.float8_e4m3fn), rows(1, 2, 2).exp()
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    stored = {"w.weight": codes, "w.weight_scale_inv": scales, "norm": rows(2)}
    a = write_checkpoint(tmp_path / "a", stored, config={"quantization_config": block})
    values = codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :130]
    b = write_checkpoint(tmp_path / "b", {"w.weight": values, "norm": rows(2)})
    c = write_checkpoint(tmp_path / "c", {"w.weight": rows(3, 256, 130), "norm": rows(2)})
    assert Comparison(a, b).run().equal
    weight = next(tensor for tensor in Comparison(a, c).run().tensors if tensor.name == "w.weight")
    assert is_close(weight.similarity, reference(values, rows(3, 256, 130)))
    assert weight.formats[0].startswith("FP8") or "fp8" in weight.formats[0].lower()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int32], ids=str)
def test_codes_with_unknown_names_are_rejected_by_the_config(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"w.codes": torch.ones(4, 4).to(dtype), "w.meta": torch.ones(4)}
    error = refused(tmp_path, tensors, config={"quantization_config": {"quant_method": "new"}})
    assert (
        "2 tensors ('w.codes': config.json has quantization_config.quant_method new, which is not known, and it is "
        in error
    )


def test_a_leftover_quantization_config_is_no_obstacle(tmp_path: Path) -> None:
    tensors = {"w": rows(0).bfloat16(), "position_ids": torch.arange(4)[None]}
    for name, config in (("a", {"quantization_config": {"quant_method": "fp8"}}), ("b", {})):
        write_checkpoint(tmp_path / name, tensors, config=config)
    assert Comparison(tmp_path / "a", tmp_path / "b").run().equal


def test_adapters_are_rejected(tmp_path: Path) -> None:
    error = refused(tmp_path, {"base_model.model.layers.0.q_proj.lora_A.weight": rows(0)})
    assert "model is an adapter (LoRA), not a model (it has a tensor" in error
    adapter = write_checkpoint(tmp_path / "ia3", {"w": rows(0)})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="is an? .*adapter.*, not a model"):
        Comparison(write_checkpoint(tmp_path / "a", {"w": rows(0)}), adapter)
    with pytest.raises(CheckpointError, match="is an adapter of the kind"):
        Comparison(tmp_path / "a", f"{tmp_path / 'a'}+{adapter}")


def test_missing_models_are_rejected(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", {"w": rows(0)})
    with pytest.raises(CheckpointError, match="there is no such directory or file"):
        Comparison(a, tmp_path / "b")
