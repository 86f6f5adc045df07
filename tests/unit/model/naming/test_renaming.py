"""Random pairs of prefixes give the names of a plain reference, or an error where that has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mergeloom.engine.model.naming.renaming import renamed
from mergeloom.engine.recipe.entries.rename import Rename
from mergeloom.engine.recipe.types import ModelReference
from mergeloom.errors import RecipeError
from mergeloom.io.tensors.dtypes import F32
from mergeloom.io.tensors.refs import TensorRef
from mergeloom.io.tensors.table import TensorTable
from tests.unit.graph.building import checkpoint
from tests.unit.recipe.parsing import parse

RECIPE = parse("merge_method: linear\nmodels: [{model: m, parameters: {weight: 1}}]\n")
PREFIXES = st.lists(st.sampled_from("ab"), max_size=2).map(lambda parts: "".join(f"{part}." for part in parts))
NAMES = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map(".".join)


def reference(names: list[str], pairs: list[tuple[str, str]]) -> list[str] | None:
    """The new names; None if a pair is not used, or they are not valid or not unique."""
    result, used = [], set()
    for name in names:
        pair = next((pair for pair in pairs if name[: len(pair[0])] == pair[0]), ("", ""))
        used.add(pair)
        result.append(pair[1] + name[len(pair[0]) :])
    valid = all(name.strip(".") == name != "" for name in result)
    return result if valid and len(set(result)) == len(names) and used >= set(pairs) else None


@given(
    st.lists(NAMES, min_size=1, max_size=6, unique=True),
    st.lists(st.tuples(PREFIXES, PREFIXES), min_size=1, max_size=3, unique_by=lambda pair: pair[0]),
    st.booleans(),
)
def test_new_names_are_those_of_a_plain_reference(
    names: list[str], pairs: list[tuple[str, str]], in_table: bool
) -> None:
    refs = {name: TensorRef(Path("f"), 8 * number, 8, F32, (2,)) for number, name in enumerate(names)}
    model = replace(checkpoint("m", {}), tensors=TensorTable.of(refs) if in_table else refs)
    expected = reference(names, pairs)
    try:
        found = renamed(RECIPE, ModelReference("m"), Rename(tuple(pairs)), model)
    except RecipeError:
        assert expected is None
        return
    assert expected is not None
    assert list(found.tensors.items()) == list(zip(expected, refs.values(), strict=True))
    assert found.stored == {new: old for new, old in zip(expected, names, strict=True) if new != old}
