"""The tensors of a model whose values are computed from several stored tensors, in a table or in a dict."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mergeloom.engine.model.formats.registry import tensors_of
from mergeloom.engine.model.logical import (
    Decode,
    LogicalTensor,
    LogicalTensors,
    Part,
    class_counts,
    kind_of,
    shape_of,
)
from mergeloom.engine.model.values.columns import Another
from mergeloom.engine.recipe.types import ModelReference
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from mergeloom.io.tensors.dtypes import BF16, DTYPES, F32
from mergeloom.io.tensors.refs import TensorRef
from mergeloom.io.tensors.table import TensorTable
from mergeloom.methods.formats.scaled import FP8_BLOCKS
from mergeloom.methods.kernel.access import BlockRows, Slice

BYTES_OF_A_VALUE = 50
"""The most memory that a value may take besides its name and its stored tensors, in bytes."""
F8 = DTYPES["F8_E4M3"]
SHAPES = {
    "norm": (BF16, (4,)),
    "a.weight": (F8, (4, 6)),
    "a.weight_scale": (F32, (2, 3)),
    "experts": (BF16, (3, 4)),
    "b.weight": (F8, (4, 6)),
    "b.input_scale": (F32, (1,)),
    "c.codes": (F8, (4, 6)),
    "b.weight_scale": (F32, (2, 3)),
    "c.scales": (F32, (6,)),
}
DECODE = Decode(FP8_BLOCKS)


def stored() -> dict[str, TensorRef]:
    refs, offset = {}, 0
    for name, (dtype, shape) in SHAPES.items():
        size = dtype.nbytes(shape[0] * (shape[1] if len(shape) > 1 else 1))
        refs[name] = TensorRef(Path("m"), offset, size, dtype, shape)
        offset += size
    return refs


REFS = stored()


def blocks(name: str, codes: str, scales: str, *companions: str) -> LogicalTensor:
    parts = (Part(codes, REFS[codes]), Part.seen_as(scales, REFS[scales], BlockRows(2, 2), (2, 3)))
    return LogicalTensor(name, (4, 6), BF16, parts, DECODE, tuple(Part(each, REFS[each]) for each in companions))


def row(name: str, number: int) -> LogicalTensor:
    return LogicalTensor(name, (1, 4), BF16, (Part("experts", REFS["experts"], Slice(4 * number, 4)),))


VALUES = [
    blocks("a.weight", "a.weight", "a.weight_scale"),
    row("experts.1", 1),
    blocks("b.weight", "b.weight", "b.weight_scale", "b.input_scale"),
    row("experts.0", 0),
    blocks("c", "c.codes", "c.scales"),
]
NAMES = ["norm", "a.weight", "experts.1", "experts.0", "b.weight", "c"]


@pytest.fixture(params=["table", "dict"])
def tensors(request: pytest.FixtureRequest) -> LogicalTensors:
    return LogicalTensors(TensorTable.of(REFS) if request.param == "table" else REFS, iter(VALUES))


def test_they_are_a_mapping_in_the_order_of_first_parts(tensors: LogicalTensors) -> None:
    assert list(tensors) == NAMES
    assert len(tensors) == len(NAMES)
    assert [tensors[name] for name in NAMES] == [REFS["norm"], *(VALUES[n] for n in (0, 1, 3, 2, 4))]
    assert all(name in tensors for name in NAMES)
    for name in ("experts", "a.weight_scale", "c.codes", "b.input_scale", "other", ""):
        assert name not in tensors
        with pytest.raises(KeyError):
            tensors[name]
        with pytest.raises(KeyError):
            tensors.class_of(name)
    assert 3 not in tensors


def test_what_is_known_about_parts(tensors: LogicalTensors) -> None:
    assert set(tensors.parts) == set(SHAPES) - {"norm"}
    assert list(tensors.quantized) == ["a.weight", "b.weight", "c"]
    assert tensors.codes == dict.fromkeys(set(SHAPES) - {"norm", "experts"}, FP8_BLOCKS.name)
    assert {part: tensors.values_of(part) for part in SHAPES} == {
        "norm": [],
        "experts": ["experts.1", "experts.0"],
        **{key: ["a.weight"] for key in ["a.weight", "a.weight_scale"]},
        **{key: ["b.weight"] for key in ["b.weight", "b.weight_scale", "b.input_scale"]},
        **{key: ["c"] for key in ["c.codes", "c.scales"]},
    }
    scales = dict.fromkeys(["a.weight_scale", "b.weight_scale", "b.input_scale", "c.scales"], (0, 0))
    codes = dict.fromkeys(["a.weight", "b.weight", "c.codes"], (1, 24))
    assert {part: tensors.counts_of(part) for part in SHAPES} == {**scales, **codes, "norm": None, "experts": None}


def test_classes_stand_for_their_tensors(tensors: LogicalTensors) -> None:
    assert [shape_of(tensors, name) for name in NAMES] == [tensors[name].shape for name in NAMES]
    assert [kind_of(tensors, name).dtype for name in NAMES] == [BF16] * len(NAMES)
    assert all(kind_of(tensors, each.name) == each for each in VALUES)
    counts: Counter[tuple[int, ...]] = Counter()
    for kind, count in class_counts(tensors):
        counts[kind.shape] += count
    assert counts == Counter(tensors[name].shape for name in NAMES)


def test_a_value_like_another_one_has_its_own_name_and_parts() -> None:
    first = blocks("a.weight", "a.weight", "a.weight_scale")
    another = Another(first, "b.weight", ("b.weight", "b.weight_scale"))
    tensors = LogicalTensors(TensorTable.of(REFS), [first, another])
    assert tensors["b.weight"] == blocks("b.weight", "b.weight", "b.weight_scale")
    assert tensors.class_of("b.weight") is tensors.class_of("a.weight") is first
    found = tensors.stored_rows(["b.weight", "norm", "a.weight"])
    assert found is not None
    assert found.rows == [list(SHAPES).index(each) for each in ("b.weight", "b.weight_scale", "norm", "a.weight")] + [2]
    assert found.firsts == [0, 2, 3]
    assert found.classes[0] == found.classes[2] < 0 <= found.classes[1]


def test_other_ends_of_names_or_other_shapes_are_other_classes() -> None:
    tensors = LogicalTensors(TensorTable.of(REFS), VALUES)
    found = tensors.stored_rows(["a.weight", "b.weight", "c", "experts.0", "experts.1", "norm"])
    assert found is not None
    assert len(set(found.classes)) == 6


def test_of_values_with_one_name_the_last_one_counts(tensors: LogicalTensors) -> None:
    last = blocks("a.weight", "b.weight", "b.weight_scale")
    found = LogicalTensors(REFS, [*VALUES[:2], VALUES[3], last])
    assert found["a.weight"] == last
    assert "a.weight_scale" in found
    assert set(found.parts) == {"experts", "b.weight", "b.weight_scale"}


def test_a_part_of_another_model_is_kept_as_it_is() -> None:
    mine, theirs = Part("a.weight", REFS["a.weight"]), REFS["b.weight"]
    other = Part("norm", theirs, owner=ModelReference("adapter"))
    value = LogicalTensor("a.weight", (4, 6), BF16, (mine, other), DECODE)
    tensors = LogicalTensors(TensorTable.of(REFS), [value])
    assert tensors["a.weight"] is value
    assert tensors["norm"] == REFS["norm"]
    assert tensors.stored_rows(["a.weight", "norm"]) == ([None, 0], [0], [0, 0])
    assert list(tensors) == list(SHAPES)


def twin(refs: dict[str, TensorRef], other: TensorTable) -> TensorTable:
    """A table of the same names in another file, which shares them with a table."""
    places = {name: replace(ref, file=Path("twin"), offset=ref.offset + 8) for name, ref in refs.items()}
    table = TensorTable.of(places)
    table.share_names(other)
    return table


def test_the_values_of_a_twin_are_in_its_own_files() -> None:
    tensors = LogicalTensors(TensorTable.of(REFS), VALUES)
    assert tensors.table is not None
    table = twin(REFS, tensors.table)
    seen = tensors.seen_in(table)
    assert seen is not None
    assert seen.shares_names(tensors)
    assert list(seen) == list(tensors)
    assert seen["b.weight"] == replace(
        tensors["b.weight"],
        parts=tuple(replace(part, ref=table[part.name]) for part in VALUES[2].parts),
        companions=(Part("b.input_scale", table["b.input_scale"]),),
    )
    assert seen["norm"] == table["norm"] != tensors["norm"]
    assert {ref.file for name in seen for ref in files_of(seen[name])} == {Path("twin")}
    assert {ref.file for name in tensors for ref in files_of(tensors[name])} == {Path("m")}


def files_of(tensor: TensorRef | LogicalTensor) -> list[TensorRef]:
    if isinstance(tensor, TensorRef):
        return [tensor]
    return [part.as_stored for part in tensor.all_parts]


def test_other_dtypes_names_or_a_part_elsewhere_are_no_twin() -> None:
    plain = [value for value in VALUES if value.decode is not None]
    tensors = LogicalTensors(TensorTable.of(REFS), plain)
    assert tensors.table is not None
    narrow = REFS | {"norm": replace(REFS["norm"], dtype=F32)}
    renamed = {name.replace("norm", "ln"): ref for name, ref in REFS.items()}
    assert tensors.seen_in(twin(REFS, tensors.table)) is not None
    assert tensors.seen_in(twin(narrow, tensors.table)) is None
    assert tensors.seen_in(twin(renamed, tensors.table)) is None
    assert tensors.seen_in(REFS) is None
    other = Part("norm", REFS["b.weight"], owner=ModelReference("adapter"))
    adapted = LogicalTensor("a.weight", (4, 6), BF16, (Part("a.weight", REFS["a.weight"]), other), DECODE)
    assert LogicalTensors(tensors.table, [adapted]).seen_in(twin(REFS, tensors.table)) is None


def test_a_value_takes_a_few_bytes() -> None:
    shapes = {"weight": (F8, (4, 6)), "weight_scale_inv": (F32, (2, 3))}
    modules = [f"model.layers.{layer}.mlp.experts.{e}.up_proj" for layer in range(20) for e in range(100)]
    refs = {
        f"{module}.{end}": TensorRef(Path("m"), 8 * number, 24, *shapes[end])
        for number, module in enumerate(modules)
        for end in shapes
    }
    files = (Path("m"),)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}
    made = Checkpoint(Path("m"), TensorTable.of(refs), config, {}, files, ())
    tensors_of(made)  # what is found once for a checkpoint's names
    tracemalloc.start()
    tensors = tensors_of(made)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(tensors, LogicalTensors)
    assert list(tensors) == [f"{module}.weight" for module in modules]
    assert used <= BYTES_OF_A_VALUE * len(modules)
