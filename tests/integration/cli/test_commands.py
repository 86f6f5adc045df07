"""The command line: its output, options, exit codes and imports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

import mergeloom
from mergeloom import __main__
from mergeloom.cli.app import cli
from tests.conftest import MakeModel
from tests.support.command_line import COMMAND, run, spawn
from tests.support.waiting import HANG_SECONDS


@pytest.fixture
def recipe(tmp_path: Path, llamas: dict[str, Path]) -> Path:
    """Write a recipe for the mean of two models."""
    models = [{"model": str(llamas[name]), "parameters": {"weight": 0.5}} for name in "ab"]
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    return path


@pytest.fixture
def stack(tmp_path: Path, llamas: dict[str, Path]) -> Path:
    """Write a recipe that only copies layers."""
    slices = [{"sources": [{"model": str(llamas["a"]), "layer_range": part}]} for part in ([0, 3], [1, 3])]
    path = tmp_path / "stack.yml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    return path


# ------------------------------------------------------------------------------------------------ help


def test_help_lists_the_commands() -> None:
    ended = spawn("--help")
    assert ended.returncode == 0
    assert all(command in ended.stdout for command in ("merge", "plan", "inspect", "diff", "methods"))


def test_help_and_version_import_nothing_heavy() -> None:
    code = "import sys; from mergeloom.__main__ import main; main(['--help']); main(['--version']); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "rich", "networkx", "yaml", "safetensors", "psutil"} & set(modules)
    ours = {name.removeprefix("mergeloom.") for name in modules if name.startswith("mergeloom.")}
    commands = (
        *("app", "diff", "extract_lora", "inspect", "merge", "mergekit", "methods", "options", "output", "plan"),
        *("stack", "streams", "verify"),
    )
    assert ours == {"__main__", "cli", "errors", "version", *(f"cli.{name}" for name in commands)}


def test_version() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert result.output.split()[-1] == mergeloom.__version__


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_and_option_has_help(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "-h"])
    assert result.exit_code == 0
    found = cli.commands[command]
    assert found.help
    for parameter in found.params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name  # type: ignore[attr-defined]


def test_merge_and_plan_share_their_options() -> None:
    shared = {
        *("max_ram", "max_vram", "device", "seed", "shard_size", "threads", "overrides", "strict", "methods"),
        *("recipe", "out", "survival"),
    }
    names = {command: {p.name for p in cli.commands[command].params} for command in ("merge", "plan")}
    assert names["merge"] - names["plan"] == {
        *("report", "restart", "no_output", "fresh", "discard"),
        *("digests", "dry_run", "quiet", "keep_paths"),
    }
    assert names["plan"] - names["merge"] == {
        *("as_json", "explain", "graph", "graph_detail", "html", "machine", "rates", "steps", "timed", "what_if")
    }
    assert names["merge"] & names["plan"] == shared


# ------------------------------------------------------------------------------------------------ plan


def test_plan_prints_plain_lines_where_there_is_no_terminal(recipe: Path) -> None:
    ended = run("plan", recipe)
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert "\x1b" not in ended.stdout
    assert "linear of 2 models: 4 layers" in ended.stdout
    assert "peak RAM" in ended.stdout


def test_plan_as_json_has_its_keys(recipe: Path) -> None:
    found = json.loads(run("plan", recipe, "--json").stdout)
    assert {"tensors", "parameters", "bytes", "layers", "shards"} <= found["output"].keys()
    assert {"models", "tensors", "bytes"} <= found["inputs"].keys()
    assert {
        *("bytes_read", "bytes_written", "bytes_shared", "peak_ram", "peak_vram", "minimum_ram", "minimum_vram"),
        *("max_ram", "max_vram", "device", "warnings"),
    } <= found.keys()


def test_plan_takes_the_options(recipe: Path) -> None:
    options = ("--max-ram", "2GiB", "--device", "cpu", "--threads", 1, "--shard-size", "40KB", "--json")
    found = json.loads(run("plan", recipe, *options).stdout)
    assert found["max_ram"] == 2 << 30
    assert (found["device"], found["threads"]) == ("cpu", 1)
    assert found["output"]["shards"] > 1


def test_plan_with_out_says_whether_it_can_be_written(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model"
    ended = run("plan", recipe, out)
    assert ended.returncode == 0
    assert str(out) in ended.stdout
    assert "free" in ended.stdout
    assert not out.parent.exists()
    destination = json.loads(run("plan", recipe, out, "--json").stdout)["destination"]
    assert destination["problem"] is None
    assert destination["free"] > destination["needed"] > 0


def test_plan_with_an_occupied_out_prints_the_plan_and_fails(recipe: Path, tmp_path: Path) -> None:
    ended = run("plan", recipe, tmp_path)
    assert ended.returncode == 2
    assert "peak RAM" in ended.stdout
    assert "not empty" in ended.stderr


def test_plan_with_a_disk_too_small(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    assert __main__.main(["plan", str(recipe), str(tmp_path / "out")]) == 3


def test_plan_of_a_stack_needs_no_torch(stack: Path) -> None:
    code = "import sys; from mergeloom.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "plan", str(stack)], check=True, capture_output=True)


def test_plan_steps_prints_the_schedule(recipe: Path) -> None:
    plan = mergeloom.plan(recipe)
    lines = run("plan", recipe, "--steps").stdout.splitlines()
    assert lines[0].split() == ["step", "tensor", "pass", "device", "read", "kept", "dropped", "RAM"]
    assert len(lines) == 1 + len(plan.schedule.steps)
    assert lines[1].split()[:2] == ["1", plan.built.graph.label(plan.schedule.steps[0].node)]


def test_plan_steps_as_json(recipe: Path) -> None:
    schedule = mergeloom.plan(recipe).schedule
    rows = json.loads(run("plan", recipe, "--steps", "--json").stdout)
    assert [row["step"] for row in rows] == list(range(1, len(schedule.steps) + 1))
    assert sum(source["nbytes"] for row in rows for source in row["read"]) == schedule.bytes_read
    assert rows[0].keys() == {
        *("step", "tensor", "index", "passes", "device", "read", "uploaded", "kept", "dropped", "ram", "vram")
    }


def test_plan_steps_shows_vram_for_a_gpu(recipe: Path) -> None:
    lines = run("plan", recipe, "--steps", "--for", "ram=16GiB,vram=4GiB").stdout.splitlines()
    assert all(column in lines[0] for column in ("uploaded", "kept in VRAM", "dropped from VRAM"))
    assert "cuda:0" in lines[1]


@pytest.mark.parametrize("detail", ["layer", "tensor"])
def test_plan_graph_writes_the_task_graph(detail: str, recipe: Path, tmp_path: Path) -> None:
    import networkx

    plan = mergeloom.plan(recipe)
    for _ in range(2):  # an exported graph is replaced
        for name in ("graph.graphml", "graph.json"):
            ended = run("plan", recipe, "--graph", tmp_path / name, "--graph-detail", detail)
            assert ended.returncode == 0, ended.stderr
            assert "peak RAM" in ended.stdout
    graph = networkx.read_graphml(tmp_path / "graph.graphml")
    other = networkx.node_link_graph(json.loads((tmp_path / "graph.json").read_text()), edges="edges")
    assert dict(graph.nodes(data=True)) == dict(other.nodes(data=True))
    outputs = sum(data["tensors"] for _, data in graph.nodes(data=True) if data["kind"] == "output")
    assert outputs == len(plan.built.graph.outputs)
    assert (len(graph) < outputs) == (detail == "layer")


@pytest.mark.parametrize("name", ["graph.dot", "graph"])
def test_plan_graph_refuses_an_unknown_suffix(name: str, recipe: Path, tmp_path: Path) -> None:
    ended = run("plan", recipe, "--graph", tmp_path / name)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "use .graphml or .json" in ended.stderr
    assert not (tmp_path / name).exists()


# ------------------------------------------------------------------------------------------------ merge


def test_merge_prints_the_summary_on_stdout_and_messages_on_stderr(recipe: Path, tmp_path: Path) -> None:
    ended = spawn("merge", recipe, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert f"Merged into {tmp_path / 'out'}" in ended.stdout
    assert "as planned" in ended.stdout
    assert "linear of 2 models" in ended.stderr
    assert "\x1b" not in ended.stdout + ended.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_merge_quietly(recipe: Path, tmp_path: Path) -> None:
    ended = run("merge", recipe, tmp_path / "out", "--quiet")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_merge_reports_planned_and_measured_values(recipe: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert spawn("merge", recipe, tmp_path / "out", "--quiet", "--report", report).returncode == 0
    found = json.loads(report.read_text())
    measured = found["measured"]
    assert measured["bytes_read"] == found["bytes_read"]
    assert measured["bytes_written"] == found["bytes_written"]
    assert 0 < measured["peak_rss"] <= found["peak_ram"]
    assert {"read", "compute", "write"} <= measured["lanes"].keys()


@pytest.mark.parametrize("option", ["--no-output", "--discard"])
@pytest.mark.parametrize("with_out", [False, True])
def test_a_rehearsal_writes_nothing(with_out: bool, option: str, recipe: Path, tmp_path: Path) -> None:
    out = [tmp_path / "out"] if with_out else []
    ended = run("merge", recipe, *out, option)
    assert ended.returncode == 0, ended.stderr
    assert "nothing was written" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yml"]


@pytest.mark.parametrize("option", ["--restart", "--fresh"])
def test_restart_discards_an_unfinished_merge(
    option: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = {}

    def record(*arguments: object, **options: object) -> None:
        received.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("mergeloom.engine.run.merge.merge", record)
    assert run("merge", recipe, tmp_path / "out", option).returncode == 130
    assert received["fresh"] is True


def test_merge_needs_out(recipe: Path) -> None:
    ended = run("merge", recipe)
    assert ended.returncode == 2
    assert "OUT" in ended.stderr


def test_a_report_that_cannot_be_written_is_refused_before_the_merge(recipe: Path, tmp_path: Path) -> None:
    ended = run("merge", recipe, tmp_path / "out", "--report", tmp_path / "nowhere" / "report.json")
    assert ended.returncode == 2
    assert not (tmp_path / "out").exists()


def test_merge_warns_if_less_memory_is_available_than_planned(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergeloom.engine.cost import machine

    monkeypatch.setattr(machine, "available_ram", lambda: 0)
    monkeypatch.setattr(machine, "process_memory", lambda: machine.ProcessMemory(1 << 20, 1 << 20))
    assert __main__.main(["merge", str(recipe), str(tmp_path / "out"), "--quiet"]) == 0
    assert "1MiB are available" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ inspect, methods


def test_inspect(llamas: dict[str, Path]) -> None:
    ended = run("inspect", llamas["a"])
    assert ended.returncode == 0
    assert "LlamaForCausalLM" in ended.stdout
    assert "model.layers.0.mlp.up_proj.weight" not in ended.stdout
    assert "model.layers.0.mlp.up_proj.weight" in run("inspect", llamas["a"], "--tensors").stdout
    assert json.loads(run("inspect", llamas["a"], "--json").stdout)["layers"] == 4


def test_inspect_escapes_control_characters_in_names(make_model: MakeModel) -> None:
    model = make_model("evil", {"model.\x1b[2J\x07.weight": (4, 4)})
    ended = run("inspect", model, "--tensors")
    assert ended.returncode == 0
    assert "\x1b" not in ended.stdout
    assert r"\x1b[2J\x07" in ended.stdout


def test_methods() -> None:
    ended = run("methods")
    assert ended.returncode == 0
    assert all(name in ended.stdout for name in ("linear", "passthrough"))
    page = run("methods", "linear").stdout
    assert "https://arxiv.org/abs/2203.05482" in page
    assert "normalize" in page


def test_an_unknown_method() -> None:
    ended = run("methods", "liner")
    assert ended.returncode == 2
    assert "did you mean linear?" in ended.stderr


# ------------------------------------------------------------------------------------------------ the process


def test_an_unexpected_exception_is_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("mergeloom.engine.model.inspect.inspect_model", broken)
    assert __main__.main(["inspect", "model"]) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert "please report this" in message


def test_interrupting_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergeloom.engine.model.inspect.inspect_model", interrupted)
    assert __main__.main(["inspect", "model"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("engine.execute.executor.Executor._wait", "stopped before anything was finished; nothing is left behind"),
        ("engine.run.planning.lay_out", ""),
    ],
)
def test_interrupting_a_merge_leaves_nothing(place: str, message: str, name: str, recipe: Path, tmp_path: Path) -> None:
    """A signal to the process while the engine runs, or while it plans."""
    script = (
        "import os, signal, sys; from mergeloom.cli import signals; import mergeloom.engine.run.merge as m\n"
        "from mergeloom.engine.execute import executor; import mergeloom\n"
        f"from mergeloom.__main__ import main; signals.GRACE_SECONDS = {HANG_SECONDS}\n"
        f"def stop(*arguments, **named):\n    os.kill(os.getpid(), signal.{name})\n"
        f"mergeloom.{place} = stop\nsys.exit(main(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", script, "merge", str(recipe), str(tmp_path / "out")]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + signal.Signals[name]
    expected = message or {"SIGINT": "interrupted", "SIGTERM": "terminated"}[name]
    assert ended.stderr.endswith(f"mergeloom: {expected}\n")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_closed_pipe_is_not_an_error(llamas: dict[str, Path]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [*COMMAND, "inspect", str(llamas["a"]), "--tensors"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert ended.stderr == b""
    assert ended.returncode == 128 + signal.SIGPIPE


def test_an_ascii_terminal(llamas: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "modèle"
    shutil.copytree(llamas["a"], target)
    ended = spawn("inspect", target, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 0
    assert "mod?le" in ended.stdout
