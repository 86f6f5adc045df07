"""Methods of the user's through the command line: from files and packages, and bound to what was made with them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mergeloom.engine.run.manifest import read_manifest
from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.errors import UsageError
from tests.support.command_line import run, spawn
from tests.support.faults import Kill, Stopped, watching
from tests.support.outputs import digests, read_model, same_tensors
from tests.support.paths import ROOT
from tests.support.waiting import HANG_SECONDS

HALF = """
from mergeloom.methods import Array, Inputs, add, merge_method


@merge_method("{name}")
def method(t: Inputs, *, share: float = {share}) -> Array:
    \"\"\"The sum of the models, each times a share.

    Args:
        share: share of each model.
    \"\"\"
    return add([share * x for x in t.models])
"""


pytestmark = pytest.mark.usefixtures("forget_methods")


def mergeloom(*arguments: object, path: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with another directory on Python's path."""
    start = f"import sys; sys.path.insert(0, {str(path)!r}); "
    command = [sys.executable, "-c", f"{start}from mergeloom.__main__ import main; sys.exit(main())"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=HANG_SECONDS
    )


def recipe(llamas: dict[str, Path], directory: Path, method: str = "half", more: str = "") -> Path:
    """A recipe of two models."""
    file = directory / "recipe.yml"
    models = "".join(f"  - model: {llamas[name]}\n" for name in ("a", "b"))
    file.write_text(f"merge_method: {method}\nmodels:\n{models}dtype: float32\n{more}")
    return file


def mine(directory: Path, share: float = 0.5, name: str = "half") -> Path:
    """A file with a method."""
    file = directory / "mine.py"
    file.write_text(HALF.format(name=name, share=share))
    return file


def test_from_a_file(llamas: dict[str, Path], tmp_path: Path) -> None:
    file, what = mine(tmp_path), recipe(llamas, tmp_path)
    unknown = run("plan", what)
    assert unknown.returncode == 2
    assert "unknown merge method" in unknown.stderr
    done = spawn("merge", what, tmp_path / "out", "--methods", file, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    linear = recipe(llamas, tmp_path, "linear", "parameters: {weight: 0.5}\n")
    assert run("merge", linear, tmp_path / "linear", "--device", "cpu").returncode == 0
    same_tensors(read_model(tmp_path / "out"), read_model(tmp_path / "linear"))
    noted = read_manifest(tmp_path / "out")["methods"]
    assert list(noted) == ["half"]
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", noted["half"])
    assert "methods" not in read_manifest(tmp_path / "linear")
    what = recipe(llamas, tmp_path)
    explained = run("plan", what, "--methods", file, "--device", "cpu", "--explain", "model.norm.weight")
    assert (explained.returncode, "half" in explained.stdout) == (0, True), explained.stderr
    shown = run("methods", "half", "--methods", file)
    assert shown.returncode == 0
    assert "The sum of the models, each times a share." in shown.stdout
    assert "  half " in run("methods", "--methods", file).stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "file not found"),
        ("def (", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("x = 1", "registers no merge method"),
        (HALF.format(name="linear", share=1), "already registered"),
    ],
)
def test_a_file_with_a_mistake(llamas: dict[str, Path], tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "wrong.py"
    if text is not None:
        file.write_text(text)
    for command in (("plan", recipe(llamas, tmp_path)), ("methods",)):
        done = run(*command, "--methods", file)
        assert done.returncode == 2
        assert f"mergeloom: --methods {file}: " in done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_from_a_package(llamas: dict[str, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "halves-1.2.dist-info"
    info.mkdir(parents=True)
    mine(site).rename(site / "halves.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[mergeloom.methods]\nhalves = halves\n")
    done = mergeloom("merge", recipe(llamas, tmp_path), tmp_path / "out", "--device", "cpu", path=site)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "out")["methods"] == {"half": "halves 1.2"}
    assert "  half " in mergeloom("methods", path=site).stdout


def test_an_unfinished_merge_is_bound_to_the_code(llamas: dict[str, Path], tmp_path: Path) -> None:
    what = recipe(llamas, tmp_path)
    options = Options(max_ram=4 << 30, device="cpu", threads=1, shard_size=100_000, methods=(str(mine(tmp_path)),))
    calls = Kill()
    with watching(calls):
        merge(what, tmp_path / "whole", options, group_bytes=20_000)
    out = tmp_path / "out"
    with watching(Kill(len(calls.calls) * 2 // 3)), pytest.raises(Stopped):
        merge(what, out, options, group_bytes=20_000)
    mine(tmp_path, share=0.25)  # the same file, changed: seen within one process, too
    with pytest.raises(UsageError, match=r"the code of user-defined methods: it was \{'half': 'sha256:"):
        merge(what, out, options, group_bytes=20_000)
    mine(tmp_path)
    merge(what, out, options, group_bytes=20_000)
    assert digests(out) == digests(tmp_path / "whole")


def test_the_page_on_methods_keeps_its_word(llamas: dict[str, Path], tmp_path: Path) -> None:
    page = (ROOT / "docs" / "methods.md").read_text().split("# A method of your own")[1]
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        file = tmp_path / f"documented{number}.py"
        file.write_text(block)
        name = re.search(r'@merge_method\(\s*"(\w+)"', block)
        assert name is not None
        shown = run("methods", name[1], "--methods", file)
        assert shown.returncode == 0, shown.stderr
        more = f"base_model: {llamas['base']}\n" if "Base.REQUIRED" in block else ""
        done = run(
            *("merge", recipe(llamas, tmp_path, name[1], more), tmp_path / name[1], "--methods", file),
            *("--device", "cpu"),
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("old", "new", "line", "says", "lists"),
    [
        ("return add(", "return t.models[0].mean() * add(", 12, ".mean is not an operation on arrays", True),
        ("return add(", "if t.models[0] > 0: return add(", 12, "if, and, or, not, in or a chained comparison", True),
        ("return add(", "add(", 5, "method half must return an Array, such as t.base + x, and returns NoneType", True),
        ("*, share", "share", 5, "must take the inputs and then keyword-only parameters: (t: 'Inputs', share", False),
        ("share: float", "share: str", 5, "'half': parameter 'share' must be a float, int or bool", False),
        ("return add(", "return 1 / 0 * add(", 12, "merge method half: ZeroDivisionError: division by zero", False),
    ],
)
def test_a_method_with_a_mistake_is_an_error_with_its_line(
    old: str, new: str, line: int, says: str, lists: bool, llamas: dict[str, Path], tmp_path: Path
) -> None:
    """The error lists the operations, if it is about one."""
    file = tmp_path / "own.py"
    text = HALF.format(name="half", share=1)
    assert old in text
    file.write_text("from __future__ import annotations\n" + text.lstrip("\n").replace(old, new))
    for command in (("plan", recipe(llamas, tmp_path)), ("methods", "half")):
        ended = run(*command, "--methods", file)
        assert ended.returncode == 2
        assert f"{file}:{line}: " in ended.stderr
        assert says in ended.stderr
        assert ("allowed: + - * /, abs, sqrt, exp, log, comparisons" in ended.stderr) == lists
        assert "Traceback" not in ended.stderr


def test_a_method_that_keeps_arrays_between_calls_is_an_error(llamas: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    text = HALF.format(name="half", share=1)
    file.write_text("kept = []" + text.replace("    return", "    kept.append(t.models[0])\n    return kept[0] +"))
    ended = run("plan", recipe(llamas, tmp_path), "--methods", file)
    assert ended.returncode == 2
    assert f"{file}:13: an array of another tensor: methods cannot keep arrays between calls" in ended.stderr
    assert "Traceback" not in ended.stderr
