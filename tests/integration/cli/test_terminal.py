"""Habits of the command line, and standard streams that are closed, full or a terminal of any width."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeloom.report.sections import Grid, Section, show
from tests.support.command_line import COMMAND, run, spawn

FULL = Path("/dev/full")


@pytest.fixture
def stack(tmp_path: Path, llamas: dict[str, Path]) -> Path:
    """Write a recipe that only copies layers."""
    slices = [{"sources": [{"model": str(llamas["a"]), "layer_range": part}]} for part in ([0, 3], [1, 3])]
    path = tmp_path / "stack.yml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    return path


def recipe_in(out: Path) -> Any:
    """Return the recipe in the manifest of a merge."""
    return yaml.safe_load(json.loads((out / "mergeloom.json").read_text())["recipe"])


# ------------------------------------------------------------------------------------------------ habits


def test_the_version_has_a_short_option() -> None:
    assert run("-V").stdout == run("--version").stdout != ""


def test_a_recipe_on_standard_input(stack: Path, tmp_path: Path) -> None:
    for out, arguments in (("piped", ["-"]), ("named", [stack])):
        ended = spawn("merge", *arguments, tmp_path / out, "--quiet", input=stack.read_text())
        assert (ended.returncode, ended.stderr) == (0, "")
    assert recipe_in(tmp_path / "piped") == recipe_in(tmp_path / "named")
    ended = spawn("plan", "-", input="merge_method: lin\nmodels: [{model: a}]\n")
    assert ended.returncode == 2
    assert "/dev/stdin:1: merge_method: unknown merge method 'lin'; did you mean `linear`?" in ended.stderr


def test_a_dry_run_prints_the_plan(stack: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run("merge", stack, out, "--dry-run", "--max-ram", "8G")
    assert ended.returncode == 0
    planned = run("plan", stack, out, "--max-ram", "8GiB").stdout
    (dry, memory), (plan, _) = (text.split("\nMemory\n") for text in (ended.stdout, planned))
    assert dry == plan
    assert " of 8GiB: " in memory
    assert str(out) in memory
    assert not out.exists()
    assert "--dry-run and --report are mutually exclusive" in run("merge", stack, "--dry-run", "--report", "x").stderr
    assert run("merge", stack, tmp_path, "--dry-run").returncode == run("plan", stack, tmp_path).returncode == 2


def test_a_percentage_of_the_memory(stack: Path) -> None:
    machine = ("--for", "ram=64GiB,vram=24G", "--json")
    found = json.loads(run("plan", stack, "--max-ram", "50%", *machine).stdout)
    assert found["max_ram"] == 32 << 30
    ended = run("plan", stack, "--max-ram", "110%")
    assert ended.returncode == 2
    assert "a percentage of the memory is more than 0% and at most 100%" in ended.stderr


def test_a_percentage_of_vram(llamas: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    models = [{"model": str(llamas[name]), "parameters": {"weight": 0.5}} for name in "ab"]
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    ended = run("plan", path, "--for", "vram=24G,ram=64G", "--max-vram", "25%", "--cuda", "--json")
    found = json.loads(ended.stdout)
    assert (found["max_vram"], found["device"]) == (6 << 30, "cuda:0")


def test_a_shard_size_of_mergekit_is_not_taken_for_bytes(stack: Path) -> None:
    ended = run("plan", stack, "--shard-size", "5B")
    assert ended.returncode == 2
    assert "'5B' is 5 bytes for each file, which is too small: use a size such as 5GB" in ended.stderr


def test_options_of_mergekit(stack: Path, tmp_path: Path) -> None:
    options = ("--cuda", "--lazy-unpickle", "--copy-tokenizer", "--random-seed", 3)
    ended = run("merge", stack, tmp_path / "out", *options)
    assert ended.returncode == 0, ended.stderr
    assert "--lazy-unpickle has no effect: memory is limited by --max-ram\n" in ended.stderr
    assert json.loads((tmp_path / "out" / "mergeloom.json").read_text())["seed"] == 3
    assert run("merge", stack, tmp_path / "quiet", *options, "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("config.yml", "out", "--cuda"), "to merge, use `mergeloom merge config.yml out --cuda`"),
        (("mrege", "config.yml"), "did you mean `merge`?"),
        (("version",), "use `mergeloom --version`"),
        (("frobnicate",), "the commands are diff, extract-lora, inspect, merge, methods, plan, stack, verify"),
    ],
)
def test_an_unknown_command_names_the_right_one(arguments: tuple[str, ...], advice: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert advice in ended.stderr


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("--explain", "lm_head.weight"), ("--steps",)),
        (("--steps",), ("--html", "page.html")),
        (("--steps",), ("--what-if",)),
        (("--explain", "lm_head.weight"), ("--time",)),
        (("--explain", "lm_head.weight"), ("--rates", "disk_read=1GB/s")),
    ],
)
def test_plan_refuses_an_option_that_would_have_no_effect(
    first: tuple[str, ...], second: tuple[str, ...], stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run("plan", stack, *first, *second)
    assert ended.returncode == 2
    assert f"{first[0]} and {second[0]} are mutually exclusive" in ended.stderr
    assert not Path("page.html").exists()


def test_set_makes_another_recipe(stack: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    change = ("--set", "slices.0.sources.0.layer_range=[0, 2]")
    assert run("merge", stack, out, *change, "--quiet").returncode == 0
    expected = yaml.safe_load(stack.read_text())
    expected["slices"][0]["sources"][0]["layer_range"] = [0, 2]
    for part in expected["slices"]:
        part["sources"][0]["model"] = "a"  # the published form
    assert recipe_in(out) == expected
    assert run("merge", stack, out, *change, "--quiet").returncode == 0
    ended = run("merge", stack, out, "--quiet")
    assert ended.returncode == 2
    assert "this one differs from it: the recipe: -    - 2 | +    - 3" in ended.stderr


def test_set_names_its_key(stack: Path) -> None:
    ended = run("plan", stack, "--set", "slices.5.sources=1")
    assert ended.returncode == 2
    assert "--set slices.5.sources=1: `slices` is a list, whose indices are 0 to 1, got '5'" in ended.stderr


# ------------------------------------------------------------------------------------------------ streams


def shell(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run mergeloom with the redirections of a shell command, in which "$@" is the command line."""
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.run(["sh", "-c", command, "sh", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("redirection", "warns"),
    [
        (">/dev/full", True),
        (">&-", False),
        ("2>/dev/full", False),
        ("2>&-", False),
        ("<&- >&- 2>&-", False),
        (">/dev/full 2>&1", False),
    ],
)
def test_a_merge_is_complete_whatever_happens_to_its_messages(
    redirection: str, warns: bool, stack: Path, tmp_path: Path
) -> None:
    ended = shell(f'"$@" {redirection}', "merge", stack, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    warning = "warning: the merge is complete, but its summary can't be printed: standard output can't be written"
    assert (warning in ended.stderr) == warns
    assert run("verify", tmp_path / "out", "--quiet").returncode == 0


def test_the_summary_of_a_rehearsal_is_its_result(stack: Path) -> None:
    ended = shell('"$@" >/dev/full', "merge", stack, "--no-output")
    assert ended.returncode == 5
    assert ended.stderr.endswith("mergeloom: standard output can't be written (No space left on device)\n")


def test_a_merge_survives_the_end_of_its_reader(stack: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "merge", str(stack), str(tmp_path / "out")]
    ended = subprocess.run(command, stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert ended.returncode == 0
    assert run("verify", tmp_path / "out", "--quiet").returncode == 0


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("methods",), ("merge", "--help")])
def test_a_result_that_cannot_be_written_is_an_error_without_a_traceback(arguments: tuple[str, ...]) -> None:
    ended = shell('"$@" >/dev/full', *arguments)
    assert ended.returncode == 5
    assert ended.stderr == "mergeloom: standard output can't be written (No space left on device)\n"
    assert shell('"$@" >&-', *arguments).returncode == 0
    assert shell('"$@" 2>&-', *arguments).stdout != ""


@pytest.mark.parametrize("command", ["plan --steps", "plan --json", "inspect", "verify", "diff", "stack"])
def test_every_result_of_a_command(command: str, stack: Path, tmp_path: Path, llamas: dict[str, Path]) -> None:
    out = tmp_path / "out"
    assert run("merge", stack, out, "--quiet").returncode == 0
    name, *options = command.split()
    models = {
        "plan": [stack],
        "verify": [out],
        "diff": [llamas["a"], llamas["b"]],
        "stack": [llamas["a"], "--window", 2],
    }
    ended = shell('"$@" >/dev/full', name, *models.get(name, [llamas["a"]]), *options)
    assert ended.returncode == 5
    assert "Traceback" not in ended.stderr
    assert ended.stderr.endswith("mergeloom: standard output can't be written (No space left on device)\n")


def test_an_error_keeps_its_exit_code_without_stderr(tmp_path: Path) -> None:
    for redirection in ("2>&-", "2>/dev/full", ">&- 2>&-"):
        assert shell(f'"$@" {redirection}', "plan", tmp_path / "missing.yml").returncode == 2


def test_a_file_is_not_written_to_a_closed_stream(stack: Path, tmp_path: Path) -> None:
    """The first file that is opened would become the standard output, and get its text."""
    ended = shell('"$@" >&- 2>&-', "merge", stack, tmp_path / "out", "--report", tmp_path / "report.json")
    assert ended.returncode == 0
    assert json.loads((tmp_path / "report.json").read_text())["output"]["layers"] == 5


# ------------------------------------------------------------------------------------------------ files and names


def make_pipe(path: Path) -> None:
    """Replace a file by a named pipe."""
    os.mkfifo(path)


def make_broken_link(path: Path) -> None:
    """Replace a file by a link to nothing."""
    path.symlink_to("nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "vocab.txt", "generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("make", "problem"), [(make_pipe, "is not a regular file"), (make_broken_link, "is a broken link")]
)
def test_an_unusable_file_stops_the_plan(
    make: Callable[[Path], None], problem: str, name: str, tmp_path: Path, llamas: dict[str, Path]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llamas["a"], model)
    (model / name).unlink(missing_ok=True)
    make(model / name)
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": str(model)}]}))
    for arguments in (["plan", path], ["merge", path, tmp_path / "out"]):
        ended = run(*arguments)
        assert ended.returncode == 4
        assert f"{model / name}: {problem}" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_files_that_no_output_needs_may_be_pipes_and_broken_links(tmp_path: Path, llamas: dict[str, Path]) -> None:
    model = tmp_path / "model"
    shutil.copytree(llamas["a"], model)
    make_pipe(model / "training.log")
    make_broken_link(model / "README.md")
    (model / "LICENSE\nx").write_text("")
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": str(model)}]}))
    assert run("merge", path, tmp_path / "out", "--quiet").returncode == 0


def test_names_with_newlines(tmp_path: Path, llamas: dict[str, Path]) -> None:
    model, path, out = (tmp_path / f"{name}\n.yml" for name in ("model", "recipe", "out"))
    shutil.copytree(llamas["a"], model)
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": str(model)}]}))
    ended = run("merge", path, out, "--quiet")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert run("verify", out, "--sources").returncode == 0


def test_a_name_that_is_too_long_stops_the_plan(stack: Path, tmp_path: Path) -> None:
    for command in ("plan", "merge"):
        ended = run(command, stack, tmp_path / "new" / ("x" * 300))
        assert ended.returncode == 2
        assert "a name of 300 bytes is too long: file systems allow 255" in ended.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("hard", "code"), [(64, 0), (40, 5)])
def test_fewer_descriptors_than_shards(hard: int, code: int, tmp_path: Path, llamas: dict[str, Path]) -> None:
    slices = [{"sources": [{"model": str(llamas["a"]), "layer_range": [0, 4]}]}] * 40
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    script = (
        f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (30, {hard}))\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'mergeloom', *sys.argv[1:]])"
    )
    arguments = ["merge", str(recipe), str(tmp_path / "out"), "--shard-size", "30KB", "--quiet"]
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    if code:
        assert "ulimit -n allows 40 open files, and a merge needs 64" in ended.stderr
        assert not (tmp_path / "out").exists()
    else:
        shards = list((tmp_path / "out").glob("*.safetensors"))
        assert len(shards) > hard
        assert run("verify", tmp_path / "out", "--quiet").returncode == 0


# ------------------------------------------------------------------------------------------------ widths


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        """Report a terminal."""
        return True


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_table_shows_every_cell_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    header = ("model", "layers", "tensors", "size", "used", "dtypes")
    rows = (("/models/first", "4", "38", "78.4KB", "61.1KB", "BF16"), ("second", "80", "723", "141GB", "9GB", "F32"))
    section = Section("Inputs", grid=Grid(header, rows, frozenset(header[1:5])))
    stream = Terminal()
    show([section], stream)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert max(map(len, printed.splitlines())) <= width
    for text in (*header, *rows[0], *rows[1]):
        assert text in (printed if width >= 40 else "".join(printed.split()))


@pytest.mark.parametrize("arguments", [("--help",), ("merge", "--help")])
def test_help_fits_a_narrow_terminal(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    ended = run(*arguments)
    assert ended.returncode == 0
    assert 30 < max(map(len, ended.stdout.splitlines())) <= 40


def test_no_color_prints_no_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    show([Section("Title", [("label", "value")], Grid(("a", "b"), (("1", "2"),)), warns=True)], stream)
    codes = {code for found in re.findall(r"\x1b\[([0-9;]*)m", stream.getvalue()) for code in found.split(";")}
    assert codes <= {"0", "1", ""}
