"""The plan in a notebook: a fragment without scripts and requests, bounded in size, that changes nothing around it."""

from __future__ import annotations

import re
from pathlib import Path

import mergeloom
from mergeloom.report.html.notebook import MAX_BYTES, make_fragment
from tests.conftest import MakeModel
from tests.support import models
from tests.support.plans import slerp, stacked
from tests.unit.report.pages import Page, check_no_requests


def test_a_plan_shows_its_page_without_scripts_and_requests(llamas: dict[str, Path]) -> None:
    plan = mergeloom.plan(slerp(llamas["base"], llamas["a"], normalise=1))
    text = plan._repr_html_()
    page = check_no_requests(text)
    assert page.tags[0] == ("div", {"class": "mergeloom"})
    assert {tag for tag, _ in page.tags} & {"html", "head", "body", "meta", "link", "main"} == set()
    for title in (
        "slerp of 2 models",
        "Warnings",
        "normalise",
        "Layer map",
        "Memory",
        "Inputs",
        "Work",
        "Output",
        "Recipe",
    ):
        assert title in page.text, title
    assert "too large for a notebook" not in page.text
    assert len(text.encode()) < MAX_BYTES


def test_the_styles_apply_to_nothing_else(llamas: dict[str, Path]) -> None:
    text = make_fragment(mergeloom.plan(stacked((llamas["a"], (0, 2)))))
    style = text.partition("<style>")[2].partition("</style>")[0]
    rules = [rule.strip() for rule in re.findall(r"([^{}]+)\{", style)]
    assert len(rules) > 40
    for rule in rules:
        for selector in [] if rule.startswith("@media") else rule.split(","):
            assert re.match(r"\.mergeloom($| )", selector.strip()), rule
    assert not re.search(r"(?<![\w-])body\b", " ".join(rules))


def test_a_large_plan_leaves_out_what_does_not_fit(make_model: MakeModel) -> None:
    model = make_model("a", models.tiny_llama(layers=200), fill=None)
    plan = mergeloom.plan(stacked(*((model, (part * 77 % 199, part * 77 % 199 + 1)) for part in range(3000))))
    text = plan._repr_html_()
    page = Page(text)
    assert len(text.encode()) < MAX_BYTES + 1000
    assert "1 part too large for a notebook: see mergeloom plan --html" in page.text
    assert "Layer map" not in page.text
    assert "Memory" in page.text


def test_names_from_files_are_escaped(make_model: MakeModel) -> None:
    model = make_model("<img src=x onerror=alert(1)>", {"<script>alert(1)</script>.weight": (8, 8)})
    plan = mergeloom.plan({"merge_method": "passthrough", "models": [{"model": str(model)}]})
    page = Page(plan._repr_html_())
    assert not page.all("script")
    assert not page.all("img")
    assert "<img src=x onerror=alert(1)>" in page.text
