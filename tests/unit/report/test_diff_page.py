"""The page of a comparison: heat maps and tables, self-contained, escaped and bounded in size."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mergeloom.engine.run.diff.result import Diff, NotCompared, Similarity
from mergeloom.report.html.diff_page import make_diff_page
from mergeloom.report.html.heat_map import Scale, heat_key, heat_maps
from mergeloom.report.html.origin import Origin
from tests.unit.diff.references import made_diff, made_tensor
from tests.unit.report.pages import Page, check_self_contained

EVIL = "model.<script>alert(1)</script>\"'&\x1b[31m\u202e.weight"


def layered(layers: int, kinds: int, stack: str = "model.layers") -> Diff:
    """A comparison whose distances grow with the layer."""
    tensors = [
        made_tensor(f"{stack}.{n}.k{kind}.weight", 0.001 * (n + kind + 1), stack=stack, layer=n)
        for n in range(layers)
        for kind in range(kinds)
    ]
    return made_diff(*tensors, made_tensor("model.norm.weight", 0.0), warnings=("look at this",))


def cells(page: Page) -> list[dict[str, str | None]]:
    """The cells of all heat maps."""
    return [attrs for attrs in page.all("rect") if (attrs["class"] or "").startswith("heat")]


def test_a_cell_for_each_layer_and_kind() -> None:
    page = check_self_contained(make_diff_page(layered(6, 3)))
    found = cells(page)
    assert len(found) == 2 * (6 * 3 + 1)  # for wide and for narrow windows
    opacities = [float(cell["fill-opacity"] or 0) for cell in found[: 6 * 3]]
    assert [float(cell["fill-opacity"] or 0) for cell in found[6 * 3 : -2]] == opacities
    assert opacities[0] == min(opacities) == 0.1
    assert max(opacities) == 1.0
    assert opacities[:6] == sorted(opacities[:6])
    assert found[-1]["class"] == "heat none"
    assert "k2.weight, layer 5\nrelative distance 0.008, cosine 0.500000, equal 0%" in page.text
    labels = [attrs["aria-label"] for attrs in page.all("svg")]
    assert labels == [
        *["relative distance of 3 kinds of tensors, model.layers"] * 2,
        *["relative distance of 1 kind of tensor, outside the layers"] * 2,
    ]
    for text in ("look at this", "Layers", "Kinds of tensors", "a (A) and b (B): different, 19 tensors compared"):
        assert text in page.text


def test_lists_are_on_the_page() -> None:
    diff = replace(layered(1, 1), only_in_a=("one",), not_compared=(NotCompared("two", "shape [1] in A, [2] in B"),))
    page = Page(make_diff_page(diff))
    assert "Only in A: 1 tensor" in page.text
    assert "two: shape [1] in A, [2] in B" in page.text


def test_what_is_undefined_has_its_own_color() -> None:
    undefined = replace(made_tensor("w"), similarity=Similarity(100, 0, 0, 0.0, 1.0, 0.0, 1.0))
    page = Page(make_diff_page(made_diff(undefined, made_tensor("v"))))
    assert [cell["class"] for cell in cells(page)] == ["heat undefined", "heat"] * 2


def test_a_narrow_window_shows_all_layers() -> None:
    """The names stand above their rows, so nothing has to be scrolled."""
    text = make_diff_page(layered(160, 2))
    (narrow, _) = re.findall(r'<div class="figure narrow"><svg viewBox="0 0 340 .*?</svg>', text)
    cells = [
        (float(x), float(width)) for x, width in re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', narrow)
    ]
    assert len(cells) == 320
    assert min(x for x, _ in cells) == 0
    assert max(x + width for x, width in cells) == pytest.approx(340, abs=1)
    assert re.search(r'<text x="0.0" y="14.0" class="name" text-anchor="start">k0.weight<', narrow)


def test_the_header_says_where_the_page_comes_from() -> None:
    origin = Origin("mergeloom diff a b --html <page>", "a machine, 2 cores", "2026-01-02 03:04 UTC")
    header = make_diff_page(layered(1, 1), origin).partition("</header>")[0]
    for part in (
        "<dt>command</dt><dd><code>mergeloom diff a b --html &lt;page&gt;</code></dd>",
        "<dt>machine</dt><dd>a machine, 2 cores</dd>",
        "<dt>date</dt><dd>2026-01-02 03:04 UTC</dd>",
    ):
        assert part in header
    assert "<dl>" not in make_diff_page(layered(1, 1)).partition("</header>")[0]


def test_names_are_escaped() -> None:
    tensors = [made_tensor(EVIL), made_tensor(f"{EVIL}.0.w", stack=EVIL, layer=0)]
    diff = made_diff(*tensors, a="<b>a</b>", only_in_a=("<i>x</i>",), warnings=("<u>y</u>",))
    text = make_diff_page(diff)
    page = check_self_contained(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "b", "u")]
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<script>alert(1)</script>" in page.text
    assert "<b>a</b> (A)" in page.text


def test_the_size_is_bounded() -> None:
    small, large = (len(make_diff_page(layered(160 * n, 40 * n))) for n in (1, 3))
    assert large < 1.1 * small
    assert "and 80 more kinds of tensors" in make_diff_page(layered(2, 120))
    many = [made_tensor(f"s{s}.{n}.w", stack=f"s{s}", layer=n) for s in range(50) for n in range(2)]
    assert len(heat_maps(made_diff(*many))) == 4


def test_columns_join_layers_where_there_are_many() -> None:
    (found, _) = heat_maps(layered(321, 1))
    assert found.columns[:2] == ((0, 2), (3, 5))
    assert found.columns[-1] == (318, 320)
    assert found.cells[0, 1].difference_squares == pytest.approx(0.004**2 + 0.005**2 + 0.006**2)


def test_the_layer_of_a_stack_without_other_layers() -> None:
    """A single number far from 0, as an untrusted file may have it, makes a narrow column and not a wide page."""
    (found,) = heat_maps(made_diff(made_tensor("m.999999.w", stack="m", layer=999_999)))
    assert len(found.columns) <= 160
    assert list(found.cells) == [(0, len(found.columns) - 1)]


def test_the_key_names_the_ends_of_the_scale() -> None:
    assert Scale.of(heat_maps(made_diff(made_tensor("w", 0.0)))) is None
    scale = Scale.of(heat_maps(made_diff(made_tensor("w", 0.25), made_tensor("v", 0.0), made_tensor("u", 4.0))))
    assert scale == Scale(0.25, 4.0)
    assert scale.opacity(1.0) == pytest.approx(0.55)
    assert [f"{step:.3g}" for step in scale.steps()] == ["0.25", "0.5", "1", "2", "4"]
    assert Page(heat_key(scale)).text == "00.250.5124undefined"
    assert Scale(1e-320, 1e300).opacity(1e300) == pytest.approx(1.0)
