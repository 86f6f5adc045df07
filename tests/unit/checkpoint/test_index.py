"""The weight map of an index is read from any valid JSON, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.errors import CheckpointError
from mergeloom.io.checkpoint.index import read_weight_map
from tests.unit.checkpoint.checkpoints import INDEX

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
SHARDS = st.sampled_from(["x.safetensors", "./x.safetensors", "sub/é.safetensors", 'a"b.safetensors'])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(NAMES, SHARDS, min_size=1, max_size=5),
    st.dictionaries(NAMES, NAMES | st.dictionaries(NAMES, NAMES, max_size=1), max_size=2),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.booleans(),
)
def test_any_index_is_read(
    tmp_path: Path, weight_map: dict[str, str], more: dict[str, object], indent: int | None, ascii: bool, last: bool
) -> None:
    more.pop("weight_map", None)
    document = more | {"weight_map": weight_map} if last else {"weight_map": weight_map} | more
    file = tmp_path / INDEX
    file.write_text(json.dumps(document, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    found = read_weight_map(file)
    assert list(found.items()) == [(name, shard.removeprefix("./")) for name, shard in weight_map.items()]


USUAL = '{"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}'
REFUSED = {
    "a name twice": ('"b"', '"a"', "duplicate key"),
    "two maps": ('{"metadata": {}', '{"weight_map": {}', "duplicate key"),
    "a comma at the end": ('y.safetensors"', 'y.safetensors",', "not valid JSON"),
    "two commas": (", ", ",, ", "not valid JSON"),
    "no comma": ('x.safetensors",', 'x.safetensors"', "not valid JSON"),
    "text after the map": ('"}}', '"}x}', "not valid JSON"),
    "an open object": ('"}}', '"}', "not valid JSON"),
    "an open map": ('"}}', '"', "not valid JSON"),
    "white space that JSON doesn't have": (', "b"', ',\f"b"', "not valid JSON"),
    "a mark of the byte order": ("{", "\ufeff{", "not valid JSON"),
    "a control character in a name": ('"b"', '"\t"', "not valid JSON"),
    "an invalid escape": ('"b"', '"\\x"', "not valid JSON"),
    "a number as a file": ('"y.safetensors"', "1", "expected a file name for tensor 'b'"),
    "a map inside another object": ('"metadata": {}, "weight_map": {', '"x": {"weight_map": {', "not valid JSON"),
    "a list": (USUAL, f"[{USUAL}]", "no weight_map object"),
    "a map in another object": (USUAL, f'{{"x": {USUAL}}}', "no weight_map object"),
    "an empty map": (USUAL, '{"weight_map": {}}', "its weight_map is empty"),
}


@pytest.mark.parametrize(("old", "new", "reason"), REFUSED.values(), ids=REFUSED)
def test_an_invalid_index_is_refused(old: str, new: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / INDEX
    text = USUAL.replace(old, new, 1)
    assert text != USUAL
    file.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        read_weight_map(file)
    assert reason in str(caught.value)
