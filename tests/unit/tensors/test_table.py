"""A table of tensors is a mapping like a dict of references, and stores names and classes once."""

from __future__ import annotations

import tracemalloc
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeloom.io.tensors.dtypes import BF16, F32
from mergeloom.io.tensors.refs import TensorClass, TensorRef
from mergeloom.io.tensors.table import NameSet, TensorTable, class_of, described

BYTES_OF_A_TENSOR = 80
"""The most memory that a tensor may take in a table in addition to its name, in bytes."""

DTYPES = st.sampled_from([BF16, F32])
SHAPES = st.lists(st.integers(0, 3), max_size=2).map(tuple)


@st.composite
def files(draw: st.DrawFn) -> dict[str, TensorRef]:
    """References by name, file by file."""
    refs: dict[str, TensorRef] = {}
    for number in range(draw(st.integers(0, 3))):
        file, offset = Path(f"{number}.safetensors"), draw(st.integers(8, 2**40))
        for _ in range(draw(st.integers(0, 3))):
            dtype, shape = draw(DTYPES), draw(SHAPES)
            nbytes = dtype.nbytes(prod(shape))
            refs[f"t{len(refs)}"] = TensorRef(file, offset, nbytes, dtype, shape)
            offset += nbytes
    return refs


@given(files(), files())
def test_a_table_is_a_mapping_of_references(first: dict[str, TensorRef], second: dict[str, TensorRef]) -> None:
    renamed = {f"u{name}": ref for name, ref in second.items()}
    expected = first | renamed
    table = TensorTable.of(first)
    for name, ref in renamed.items():
        assert table.isdisjoint([name])
        table.add(ref.file, [name], [TensorClass(ref.dtype, ref.shape, ref.nbytes)], [ref.offset])
        assert not table.isdisjoint(["absent", name])
    assert dict(table) == expected
    assert table == expected
    assert list(table.items()) == list(expected.items())
    assert list(table.values()) == list(expected.values())
    assert len(table) == len(expected)
    assert "absent" not in table
    with pytest.raises(KeyError):
        table["absent"]
    for name, ref in expected.items():
        found = class_of(table, name)
        assert (found.dtype, found.shape, found.nbytes, found.elements) == (
            ref.dtype,
            ref.shape,
            ref.nbytes,
            ref.elements,
        )
        assert class_of(expected, name) is ref
    counted = dict(table.counts())
    assert sum(counted.values()) == len(expected)
    assert set(counted) == {TensorClass(ref.dtype, ref.shape, ref.nbytes) for ref in expected.values()}
    wide = [name for name, ref in expected.items() if ref.dtype is F32]
    for tensors in (table, expected):
        assert [name for name, _ in described(tensors, lambda each: each.dtype is F32)] == wide


@given(files(), st.booleans())
def test_tables_share_names_only_in_the_same_order(refs: dict[str, TensorRef], reverse: bool) -> None:
    ours = {name: refs[name] for name in (sorted(refs, reverse=True) if reverse else refs)}
    copies = {"".join(list(name)): ref for name, ref in ours.items()}
    first, second = TensorTable.of(refs), TensorTable.of(copies)
    second.share_names(first)
    assert list(second.items()) == list(ours.items())
    assert second.shares_names(first) is (list(ours) == list(refs))
    known = {id(name) for name in first}
    assert all(id(name) in known for name in second)  # interned


@given(files(), st.lists(st.sampled_from(["t0", "t1", "t2", "x", "y"])), st.booleans())
def test_a_set_of_names_knows_what_was_added(refs: dict[str, TensorRef], names: list[str], in_table: bool) -> None:
    found, expected = NameSet(TensorTable.of(refs) if in_table else refs), set[str]()
    for name in names:
        assert found.add(name) is (name not in expected)
        expected.add(name)


@given(files(), st.lists(st.sampled_from(["t0", "t1", "t2", "x"]), max_size=2), st.data())
def test_names_are_added_together_if_all_are_new(
    refs: dict[str, TensorRef], before: list[str], data: st.DataObject
) -> None:
    found = NameSet(TensorTable.of(refs))
    for name in before:
        found.add(name)
    names = data.draw(st.lists(st.sampled_from([*refs, "x", "y"]), unique=True))
    new = not set(names) & set(before)
    assert found.add_all(names) is new
    for name in names:
        assert found.add(name) is (not new and name not in before)


@given(files(), st.data())
def test_rows_of_several_tensors(refs: dict[str, TensorRef], data: st.DataObject) -> None:
    table = TensorTable.of(refs)
    names = data.draw(st.lists(st.sampled_from(sorted(refs)), min_size=1)) if refs else []
    rows = table.rows(names)
    assert rows == [list(refs).index(name) for name in names]
    numbers = table.class_numbers(rows)
    assert [table.classes[number] for number in numbers] == [table.class_of(name) for name in names]
    if names:
        assert table.places(rows) == ([refs[name].file for name in names], [refs[name].offset for name in names])
    with pytest.raises(KeyError):
        table.rows([*names, "absent"])


def test_tables_with_other_names_do_not_share_them() -> None:
    ref = TensorRef(Path("x"), 8, 4, F32, (1,))
    first, second = TensorTable.of({"a": ref, "b": ref}), TensorTable.of({"a": ref, "c": ref})
    second.share_names(first)
    assert list(second) == ["a", "c"]
    assert not second.shares_names(first)


def test_a_tensor_takes_little_memory() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight" for layer in range(40) for e in range(256)]
    found = TensorClass(BF16, (2048, 768), 2048 * 768 * 2)
    table = TensorTable()
    tracemalloc.start()
    for first in range(0, len(names), 512):
        part = names[first : first + 512]
        table.add(Path(f"{first}.safetensors"), part, [found] * len(part), range(len(part)))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == len(names)
    assert used <= len(names) * BYTES_OF_A_TENSOR


@given(files())
def test_a_table_with_other_names_has_the_same_tensors(refs: dict[str, TensorRef]) -> None:
    table = TensorTable.of(refs)
    renamed = table.renamed(f"x.{name}" for name in refs)
    assert list(renamed.items()) == [(f"x.{name}", ref) for name, ref in refs.items()]
    assert list(table.items()) == list(refs.items())
    assert renamed.counts() == table.counts()
    assert all(renamed[f"x.{name}"] == ref for name, ref in refs.items())
