"""The documentation holds what there is: commands, options, snippets that parse, links that lead somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

import mergeloom
from mergeloom.cli import cli
from mergeloom.engine.recipe import parse_recipe
from mergeloom.engine.recipe_reader import STAGE_KEYS
from mergeloom.methods import merge_methods

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
TEXT = {page: page.read_text() for page in PAGES}
FOR_USERS = "\n".join(text for page, text in TEXT.items() if page.name == "README.md" or page.parent.name == "docs")


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by name."""
    yield from sorted(cli.commands.items())


def snippets(language: str) -> list[object]:
    """Every fenced block of a language."""
    found = []
    for page, text in TEXT.items():
        for number, match in enumerate(re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)):
            found.append(pytest.param(match[1], id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_command_is_documented(name: str, command: click.Command) -> None:
    assert f"mergeloom {name}" in FOR_USERS


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_option_is_documented(name: str, command: click.Command) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            for option in parameter.opts:
                assert re.search(rf"`{option}\b", page), f"{option} of mergeloom {name}"


def test_no_option_is_documented_that_is_not_there() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    known = {option for _, command in commands() for p in command.params for option in p.opts}
    assert set(re.findall(r"`(--[a-z-]+)", page)) <= known | {"--version", "--help"}


def test_every_exit_code_is_documented() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    errors = [value for name in mergeloom.__all__ if isinstance(value := getattr(mergeloom, name), type)]
    codes = {error.exit_code for error in errors if issubclass(error, mergeloom.MergeloomError)}
    for code in {0, *codes}:
        assert f"\n| {code} |" in page


def test_every_key_of_a_recipe_is_documented() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for key in STAGE_KEYS:
        assert f"`{key}`" in page, key


def test_every_key_of_the_plan_is_documented(llamas: dict[str, Path]) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    model = {"model": str(llamas["a"]), "parameters": {"weight": 1}}
    for key in mergeloom.plan({"merge_method": "linear", "models": [model]}).to_dict():
        assert f"`{key}`" in page, key


@pytest.mark.parametrize("snippet", snippets("yaml"))
def test_recipes_are_recipes(snippet: str) -> None:
    assert all(yaml.safe_load_all(snippet))
    recipe = parse_recipe(snippet, strict=True, methods=merge_methods())
    assert recipe.warnings == ()


@pytest.mark.parametrize("snippet", snippets("python"))
def test_python_parses_and_uses_what_there_is(snippet: str) -> None:
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mergeloom":
            assert node.attr in mergeloom.__all__


@pytest.mark.parametrize("snippet", snippets("console"))
def test_commands_that_are_shown_parse(snippet: str) -> None:
    for line in snippet.splitlines():
        if line.startswith("$ mergeloom "):
            name, *arguments = line.removeprefix("$ mergeloom ").split()
            cli.commands[name].make_context(name, arguments, help_option_names=["-h", "--help"])  # which click keeps


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_the_readme_is_short() -> None:
    assert len(TEXT[ROOT / "README.md"].splitlines()) < 200


def test_the_default_budgets_are_the_ones_that_hold() -> None:
    from mergeloom.machine import RAM_SHARE, VRAM_SHARE

    page = (ROOT / "docs" / "command-line.md").read_text()
    options = {p.name: p for p in cli.commands["plan"].params if isinstance(p, click.Option)}
    for name, share in (("max_ram", RAM_SHARE), ("max_vram", VRAM_SHARE)):
        assert f"{share:.0%} of" in page
        assert f"{share:.0%}" in (options[name].help or "")
