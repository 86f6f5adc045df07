"""YAML parsing: nodes with line numbers, limits on size and depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeloom.engine.recipe import yaml as yaml_source
from mergeloom.engine.recipe.nodes import MAX_DEPTH, MAX_NODES, Node, node_of
from mergeloom.engine.recipe.yaml import parse_yaml, read_yaml
from mergeloom.errors import RecipeError
from tests.examples import examples
from tests.support.counting import count_lines


@pytest.fixture(params=["as installed", "pure Python"])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pure Python":
        monkeypatch.setattr(yaml_source, "_LOADER", yaml.SafeLoader)


def plain(text: str) -> object:
    (document,) = parse_yaml(text).documents
    return document.plain()


@pytest.mark.usefixtures("loader")
class TestValues:
    def test_scalars_are_those_of_yaml_1_1(self) -> None:
        text = "[1, -2, 0x10, 010, 1_000, 2.5, .inf, 1.0e-5, 1e-5, on, off, Yes, ~, null, '', '1', \"on\", 2024-01-01]"
        found = plain(text)
        assert found == [
            *(1, -2, 16, 8, 1000, 2.5, float("inf"), 1e-5, "1e-5", True, False, True, None, None, "", "1", "on"),
            "2024-01-01",
        ]

    def test_anchors_and_merge_keys(self) -> None:
        text = """
base: &base {a: 1, b: [1, 2]}
other: &other {b: 3, c: 4}
one: {<<: *base, a: 5}
two:
  <<: [*other, *base]
  d: *base
quoted: {'<<': 1}
"""
        assert plain(text) == {
            "base": {"a": 1, "b": [1, 2]},
            "other": {"b": 3, "c": 4},
            "one": {"a": 5, "b": [1, 2]},
            "two": {"a": 1, "b": 3, "c": 4, "d": {"a": 1, "b": [1, 2]}},
            "quoted": {"<<": 1},
        }

    def test_the_last_of_two_equal_keys_is_used(self) -> None:
        source = parse_yaml("top:\n  a: 1\n  b: 2\n  a: 3\n")
        assert source.documents[0].plain() == {"top": {"a": 3, "b": 2}}
        (remark,) = source.remarks
        assert (remark.line, remark.path) == (4, ("top", "a"))
        assert "lines 2 and 4" in remark.message

    def test_a_key_that_overrides_a_merged_one_is_not_a_duplicate(self) -> None:
        assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2}").remarks == ()

    def test_keys_are_strings(self) -> None:
        assert plain("1: a\non: b\n2.5: c\n~: d") == {"1": "a", "on": "b", "2.5": "c", "~": "d"}
        assert plain("&k key: *k\n") == {"key": "key"}

    def test_documents(self) -> None:
        documents = parse_yaml("a: &x 1\n---\n---\nb: 2\n...\n---\n").documents
        assert [document.plain() for document in documents] == [{"a": 1}, {"b": 2}]
        with pytest.raises(RecipeError, match="no anchor"):
            parse_yaml("a: &x 1\n---\nb: *x")

    def test_lines(self) -> None:
        (document,) = parse_yaml("# comment\na:\n  - x\n  -\n    y: 1\nb: {c: 2}\n").documents
        assert document.lines() == {
            (): 2,
            ("a",): 2,
            ("a", 0): 3,
            ("a", 1): 5,
            ("a", 1, "y"): 5,
            ("b",): 6,
            ("b", "c"): 6,
        }
        assert document.lines(("stage",))["stage", "b"] == 6


@pytest.mark.usefixtures("loader")
class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "line", "message"),
        [
            ("a: [", 1, "not valid YAML"),
            ("a: 1\n\t- b", 2, "indent with spaces, not with tabs"),
            ("a:\n  model: @me/x", 2, "put text that starts with @ in quotes"),
            ("a: b: c", 1, "mapping values are not allowed"),
            ("a: 1\nb: !!python/object:os.system x", 2, "tag !!python/object:os.system is not allowed"),
            ("a: !!set {x}", 1, "tag !!set is not allowed"),
            ("a: !mine 1", 1, "tag !mine is not allowed"),
            ("a: !!int x", 1, "is not a valid YAML int"),
            ("a: !!bool x", 1, "is not a valid YAML bool"),
            ("a: !!float ''", 1, "is not a valid YAML float"),
            ("a: " + "9" * 5000, 1, "is not a valid YAML int"),
            ("a: *x", 1, "undefined alias *x"),
            ("a: &x [1, *x]", 1, "recursive alias *x"),
            ("? [a]\n: b", 1, "can't be a key"),
            ("a: &x [1]\n? *x\n: b", 2, "a key must be a string"),
            ("<<: 3", 1, "takes a mapping"),
            ("<<: [{a: 1}, 2]", 1, "takes a mapping"),
        ],
    )
    def test_with_line(self, text: str, line: int, message: str) -> None:
        with pytest.raises(RecipeError) as caught:
            parse_yaml(text, Path("r.yml"))
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"r.yml:{line}: ")

    @pytest.mark.parametrize("text", ["a: \x00", "a: \ud800", "\ufffe"])
    def test_characters(self, text: str) -> None:
        with pytest.raises(RecipeError, match="not valid YAML"):
            parse_yaml(text)

    def test_billion_laughs(self) -> None:
        text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True):
            text += f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"

        def refused() -> None:
            with pytest.raises(RecipeError, match=f"more than {MAX_NODES} values with aliases expanded"):
                parse_yaml(text)

        count_lines(refused, limit=MAX_NODES)  # far fewer lines than values are needed to see it

    def test_merge_key_bomb(self) -> None:
        text = "m: &m {" + ", ".join(f"k{i}: 1" for i in range(1000)) + "}\nl:\n" + "- {<<: *m}\n" * 1000
        with pytest.raises(RecipeError, match="more than"):
            parse_yaml(text)

    def test_depth_by_aliases(self) -> None:
        text = "- &a0 [x]\n" + "".join(f"- &a{i} [*a{i - 1}]\n" for i in range(1, 100))
        with pytest.raises(RecipeError, match=f"nested more than {MAX_DEPTH} levels deep"):
            parse_yaml(text)

    @pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 10_000])
    def test_depth(self, text: str) -> None:
        with pytest.raises(RecipeError, match=f"nested more than {MAX_DEPTH} levels deep"):
            parse_yaml(text)

    def test_the_deepest(self) -> None:
        assert plain("[" * MAX_DEPTH + "]" * MAX_DEPTH)
        with pytest.raises(RecipeError):
            parse_yaml("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


class TestFiles:
    def test_encodings(self, tmp_path: Path) -> None:
        for name, encoding in (("a", "utf-8"), ("b", "utf-8-sig"), ("c", "utf-16")):
            path = tmp_path / name
            path.write_text("a: é\n", encoding=encoding)
            assert read_yaml(path).documents[0].plain() == {"a": "é"}

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yml"
        path.write_bytes(b"a: 1\nb: \xff\n")
        with pytest.raises(RecipeError, match=r"r\.yml:2: this is not utf-8 text"):
            read_yaml(path)

    def test_missing_and_directory(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="no such file"):
            read_yaml(tmp_path / "none.yml")
        with pytest.raises(RecipeError, match="this is a directory"):
            read_yaml(tmp_path)
        with pytest.raises(RecipeError, match="cannot read the file"):
            read_yaml(Path("\0"))

    def test_too_big(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(yaml_source, "MAX_BYTES", 10)
        path = tmp_path / "r.yml"
        path.write_text("a: 1234567")
        assert read_yaml(path).documents
        path.write_text("a: 12345678")
        with pytest.raises(RecipeError, match="larger than 0 MiB"):
            read_yaml(path)


class TestData:
    def test_plain_data(self) -> None:
        numpy = pytest.importorskip("numpy")
        data = {"a": (1, 2.5, None), "b": Path("x/y"), "c": [numpy.float32(0.5), numpy.int64(3)], "d": {"e": True}}
        assert node_of(data).plain() == {"a": [1, 2.5, None], "b": "x/y", "c": [0.5, 3], "d": {"e": True}}
        assert node_of(data).lines() == {}

    @pytest.mark.parametrize("data", [{1: 2}, {"a": {1, 2}}, {"a": b"x"}, [object()]])
    def test_other_data(self, data: object) -> None:
        with pytest.raises(RecipeError):
            node_of(data)

    def test_data_in_itself(self) -> None:
        data: list[object] = []
        data.append(data)
        with pytest.raises(RecipeError, match="nested more than"):
            node_of(data)

    def test_data_without_end(self) -> None:
        data: object = "x"
        for _ in range(9):
            data = [data] * 10
        with pytest.raises(RecipeError, match="more than"):
            node_of(data)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
DATA = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8), inner), max_leaves=20)


@settings(deadline=None)
@given(DATA.filter(lambda data: data is not None), st.booleans())
def test_reads_back_what_pyyaml_writes(data: object, flow: bool) -> None:
    text = yaml.safe_dump(data, default_flow_style=flow)
    assert plain(text) == data
    assert node_of(data).plain() == data


@settings(deadline=None, max_examples=examples(300))
@given(st.text(max_size=200) | st.text(alphabet="ab:-[]{}&*<!?|>'\"#%,\n ~0.1", max_size=80))
def test_any_text_gives_nodes_or_a_recipe_error(text: str) -> None:
    try:
        documents = parse_yaml(text).documents
    except RecipeError:
        return
    assert all(isinstance(document, Node) for document in documents)


@settings(deadline=None, max_examples=examples(300))
@given(st.text(alphabet="ab: -[]{}\n1", max_size=60))
def test_agrees_with_pyyaml(text: str) -> None:
    """If both accept a text whose keys are scalars, their results are equal."""
    try:
        ours = [document.plain() for document in parse_yaml(text).documents]
    except RecipeError:
        return
    try:
        theirs = [document for document in yaml.safe_load_all(text) if document is not None]
    except (yaml.YAMLError, ValueError):
        return  # an unhashable key, for one

    loader = yaml.SafeLoader("")

    def resolved(key: object) -> str:
        """A key is its text here; PyYAML resolves it like a value: ``1:1`` is 61."""
        if not isinstance(key, str) or not key.strip():
            return str(key)
        tag = loader.resolve(yaml.ScalarNode, key, (True, False))
        return str(loader.construct_object(yaml.ScalarNode(tag, key)))

    def by_text(data: object) -> object:
        if isinstance(data, dict):
            return {resolved(key): by_text(value) for key, value in data.items()}
        return [by_text(item) for item in data] if isinstance(data, list) else data

    if "None" not in str(theirs) or "None:" not in str(theirs):  # an empty key is None there, and empty text here
        assert [by_text(item) for item in ours] == [by_text(item) for item in theirs]
