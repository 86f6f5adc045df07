"""Parses the HTML pages that mergeloom writes, for tests."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The content of a page, whose elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of every element with this tag."""
        return [attrs for name, attrs in self.tags if name == tag]


def check_self_contained(text: str) -> Page:
    """Check that a page loads nothing, runs no script and forbids both. Return its content."""
    page = check_no_requests(text)
    assert [attrs["href"] for attrs in page.all("link")] == ["data:,"]
    policy = next(attrs["content"] or "" for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    return page


def check_no_requests(text: str) -> Page:
    """Check that HTML loads nothing and runs no script. Return its content."""
    page = Page(text)
    assert not page.all("script")
    assert not page.all("img")
    assert not page.all("iframe")
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert not {"src", "srcset", "action"} & attrs.keys()
    addresses = set(re.findall(r"(?:https?:)?//[\w./-]+", re.sub(r"<!--.*?-->", "", text)))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "url(" not in text
    return page
