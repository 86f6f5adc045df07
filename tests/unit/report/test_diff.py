"""The report of a comparison: tables by layer and kind, lists, and numbers that don't claim more than they know."""

from __future__ import annotations

import pytest

from mergeloom.engine.run.diff.result import NotCompared, Similarity
from mergeloom.report.diff import diff_sections, measures
from mergeloom.report.sections import plain
from tests.unit.diff.references import made_diff, made_tensor


def layer(number: int, distance: float = 0.1, name: str = "up.weight") -> list[object]:
    """Return a tensor of one layer."""
    return [made_tensor(f"model.layers.{number}.{name}", distance, stack="model.layers", layer=number)]


def similarity(distance: float, cosine: float, equal: int) -> Similarity:
    """Return the similarity of 1,000,000 elements."""
    return Similarity(1_000_000, equal, 0, 1.0, 1.0, cosine, distance**2)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (similarity(0.0, 1.0, 1_000_000), ("0", "1.000000", "100%")),
        (similarity(0.0123456, 0.9999, 500_000), ("0.0123", "0.999900", "50.0%")),
        (similarity(1.2e-7, 1 - 1e-12, 999_999), ("1.2e-07", ">0.999999", ">99.9%")),
        (similarity(2.0, -1.0, 1), ("2", "-1.000000", "<0.1%")),
        (similarity(1.0, 0.0, 0), ("1", "0.000000", "0%")),
        (Similarity(5, 0, 0, 0.0, 1.0, 0.0, 1.0), ("-", "-", "0%")),
        (Similarity(0, 0, 0, 0.0, 0.0, 0.0, 0.0), ("-", "-", "-")),
    ],
)
def test_measures(value: Similarity, shown: tuple[str, str, str]) -> None:
    assert measures(value) == shown


def test_the_report_has_all_tables() -> None:
    tensors = [*layer(0), *layer(1, 0.3), *layer(1, 0.4, "down.weight"), made_tensor("model.norm.weight")]
    diff = made_diff(
        *tensors,  # type: ignore[arg-type]
        only_in_a=("x",),
        only_in_b=tuple(f"y{n}" for n in range(14)),
        not_compared=(NotCompared("z", "shape [1] in A, [2] in B"),),
    )
    text = plain(diff_sections(diff))
    rows = [line.split() for line in text.splitlines()]
    assert text.startswith("a (A) and b (B): different, 4 tensors compared\n")
    assert ["model.layers.0", "1", "0.1", "0.500000", "0%"] in rows
    assert ["model.layers.1", "2", "0.354", "0.500000", "0%"] in rows  # sqrt((0.09 + 0.16) / 2)
    assert ["outside", "the", "layers", "1", "0.1", "0.500000", "0%"] in rows
    assert ["model.layers.*.up.weight", "2", "0.224", "0.500000", "0%"] in rows
    assert ["model.layers.*.down.weight", "1", "0.4", "0.500000", "0%"] in rows
    assert "Only in A: 1 tensor\n  x" in text
    assert "Only in B: 14 tensors\n" in text
    assert "and 2 more (--json lists all)" in text
    assert "z: shape [1] in A, [2] in B" in text
    assert "\nTensors\n" not in text
    listed = plain(diff_sections(diff, tensors=True))
    assert ["model.layers.1.down.weight", "BF16", "0.4", "0.500000", "0%"] in [r.split() for r in listed.splitlines()]


def test_equal_layers_share_a_row() -> None:
    distances = (0.0, 0.0, 0.0, 0.1, 0.0, 0.2, 0.0, 0.0)
    diff = made_diff(*(t for n, distance in enumerate(distances) for t in layer(n, distance)))  # type: ignore[arg-type]
    rows = diff_sections(diff)[1].grid
    assert rows is not None
    assert [(row[0], row[1], row[2]) for row in rows.rows] == [
        ("model.layers.0 to 2", "3", "0"),
        ("model.layers.3", "1", "0.1"),
        ("model.layers.4", "1", "0"),
        ("model.layers.5", "1", "0.2"),
        ("model.layers.6 to 7", "2", "0"),
    ]


def test_without_layers_there_is_no_table_by_layer() -> None:
    titles = [section.title for section in diff_sections(made_diff(made_tensor("w", 0.0)))]
    assert titles == ["a (A) and b (B): equal, 1 tensor compared", "Kinds of tensors"]
