"""The HTML page: self-contained, escaped, bounded in size, and free of errors and requests in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest
import yaml

import mergeloom
from mergeloom import __main__
from mergeloom.engine.cost.estimate import assumed_rates, estimate
from mergeloom.engine.cost.machine import Machine
from mergeloom.engine.run.alternatives import alternatives
from mergeloom.engine.run.destination import look_at
from mergeloom.engine.run.plan import Options, Plan
from mergeloom.engine.run.planning import plan
from mergeloom.report.html.page import make_page
from mergeloom.report.html.svg import shortened, text_of
from tests.conftest import MakeModel
from tests.support import models
from tests.support.plans import linear, slerp, stacked, task_vectors, windows
from tests.support.waiting import HANG_SECONDS
from tests.unit.report.pages import Page, check_self_contained

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "model.<script>alert(1)</script>\"'&\x1b[31m\u202e.weight"


@pytest.fixture
def full_page(llamas: dict[str, Path], tmp_path: Path) -> str:
    """Make a page with every section."""
    recipe = slerp(llamas["base"], llamas["a"], [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.5}], normalise=1)
    planned = plan(recipe, Options(machine=Machine(ram=64 << 30, vram=1 << 30)))
    rates = assumed_rates(planned.workload)
    return make_page(
        planned,
        destination=look_at(planned, tmp_path / "out"),
        time=estimate(planned.workload, rates),
        others=alternatives(planned, rates),
    )


# ------------------------------------------------------------------------------------------------ content


def test_every_section_is_on_the_page(full_page: str) -> None:
    page = Page(full_page)
    for title in (
        *(
            "Layer map",
            "Parameters by layer",
            "Filters and gradients",
            "Memory",
            "Time",
            "With other budgets",
            "Inputs",
        ),
        *("Largest tensors", "Work", "Output", "Warnings"),
    ):
        assert title in page.text, title
    labels = [attrs["aria-label"] or "" for attrs in page.all("svg")]
    assert labels[0] == "layers of 2 inputs become 4 layers"
    assert any(label.startswith("RAM over the steps") for label in labels)
    assert any(label.startswith("VRAM over the steps") for label in labels)
    assert "normalise" in page.text


def test_nothing_is_loaded_from_elsewhere(full_page: str) -> None:
    check_self_contained(full_page)


def test_names_from_files_are_escaped(make_model: MakeModel) -> None:
    tensors = {EVIL: (64, 64), **{f"model.layers.{i}.<b>{i}</b>.weight": (8, 8) for i in range(3)}}
    model = make_model("<img src=x onerror=alert(1)>", tensors)
    text = make_page(mergeloom.plan(stacked((model, (0, 2)))))
    page = Page(text)
    assert not page.all("script")
    assert not page.all("img")
    assert not page.all("b")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<script>alert(1)</script>" in page.text
    assert "<img src=x onerror=alert(1)>" in page.text


def test_the_recipe_is_escaped(llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    comment = "# </pre><script>alert('$title ${body}')</script>\n"
    recipe.write_text(comment + yaml.safe_dump(linear(llamas["a"], llamas["b"])))
    page = Page(make_page(mergeloom.plan(recipe)))
    assert not page.all("script")
    assert comment.strip() in page.text
    assert str(recipe) in page.text


@pytest.mark.parametrize("words", ["<>&\"'", "\x00\x1b", "\u202e", "modèle 模型"])
def test_text_of(words: str) -> None:
    found = text_of(words)
    assert not set(found) & set("<>\"'\x00\x1b\u202e")
    assert "è" in text_of("modèle")


def test_long_names_are_shortened() -> None:
    assert shortened("org/model", 200) == "model"
    assert shortened("a/" + "x" * 100, 62) == "xxxxx…xxxx"
    assert len(shortened("x" * 100, 1)) <= 4


# ------------------------------------------------------------------------------------------------ size


def test_the_bands_of_a_frankenmerge(make_model: MakeModel) -> None:
    model = make_model("70b", models.llama_3_70b(), shard_bytes=10**10, fill=None)
    text = make_page(mergeloom.plan(windows(model, 80, 20, 10)))
    page = Page(text)
    bands = [attrs for attrs in page.all("path") if (attrs.get("class") or "").startswith("band")]
    assert len(bands) == 2 * 7  # in the drawings for wide and for narrow windows
    assert "layers 10-29 become layers 20-39 of the output" in page.text
    assert len(text) < 200_000


def test_many_tensors_make_no_large_page(make_model: MakeModel) -> None:
    """Mixtures of experts with FP8 scales: twice the experts hardly change the size."""
    sizes = []
    for experts in (16, 32):
        model = models.deepseek_v3(experts=experts)
        path = make_model(f"ds{experts}", model, shard_bytes=10**10, fill=None)
        planned = mergeloom.plan(stacked((path, (0, 61))))
        assert len(planned.built.graph.outputs) == len(model.tensors) > 350 * experts
        text = make_page(planned)
        Page(text)
        sizes.append(len(text))
    assert sizes[0] > 10_000
    assert abs(sizes[1] - sizes[0]) < 1_000


def test_many_bands_make_no_large_page(make_model: MakeModel) -> None:
    model = make_model("a", models.tiny_llama(layers=200), fill=None)
    slices = [(model, (place * 77 % 199, place * 77 % 199 + 1)) for place in range(3000)]
    text = make_page(mergeloom.plan(stacked(*slices)))
    assert len(text) < 1_000_000
    Page(text)


def test_nothing_to_show(make_model: MakeModel) -> None:
    """One tensor without elements, and no layers."""
    model = make_model("empty", {"model.table": (0, 4)}, dtype="I64")
    page = Page(make_page(mergeloom.plan({"merge_method": "passthrough", "models": [{"model": str(model)}]})))
    assert "Layer map" not in page.text
    assert "1 tensor" in page.text


# ------------------------------------------------------------------------------------------------ the command


def test_the_command(llamas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, file = tmp_path / "recipe.yml", tmp_path / "plan.html"
    recipe.write_text(yaml.safe_dump(linear(llamas["a"], llamas["b"])))
    assert __main__.main(["plan", str(recipe), "--html", str(file), "--what-if", "--rates", "disk_read=1GB/s"]) == 0
    assert "peak RAM" in capsys.readouterr().out
    text = file.read_text()
    assert "With other budgets" in text
    assert "at 1GB/s, given" in text
    assert __main__.main(["plan", str(recipe), "--html", str(tmp_path / "nowhere" / "plan.html")]) == 2
    assert "--html" in capsys.readouterr().err


def test_an_unusable_out_is_on_the_page(
    llamas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, file = tmp_path / "recipe.yml", tmp_path / "plan.html"
    recipe.write_text(yaml.safe_dump(linear(llamas["a"], llamas["b"])))
    assert __main__.main(["plan", str(recipe), str(tmp_path), "--html", str(file)]) == 2
    assert "is not empty" in file.read_text()


# ------------------------------------------------------------------------------------------------ in a browser


def browse(page: Path, directory: Path, *options: str) -> tuple[list[str], list[str], Path]:
    """Open a page in headless Chromium, and return its console messages, its requests and a screenshot."""
    assert CHROMIUM is not None
    directory.mkdir()
    log, image = directory / "net.json", directory / "page.png"
    ended = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
            *("--disable-dev-shm-usage", "--enable-logging=stderr", "--window-size=1180,1400"),
            "--host-resolver-rules=MAP * ~NOTFOUND",  # no requests of Chromium itself leave the machine
            *(f"--user-data-dir={directory / 'profile'}", f"--log-net-log={log}", f"--screenshot={image}"),
            *(*options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
        env={**os.environ, "HOME": str(directory)},
    )
    messages = [line for line in ended.stderr.splitlines() if ":CONSOLE" in line]
    found = []
    for event in json.loads(log.read_text())["events"]:
        parameters = event.get("params") or {}
        if "url" in parameters and parameters.get("initiator", "not an origin") != "not an origin":
            found.append(parameters["url"])
    return messages, found, image


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium isn't installed")


@needs_chromium
@pytest.mark.parametrize("kind", ["full", "evil", "stack"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_without_an_error_or_a_request(
    kind: str, dark: bool, full_page: str, make_model: MakeModel, llamas: dict[str, Path], tmp_path: Path
) -> None:
    text = full_page
    if kind == "evil":
        model = make_model("<img src=x onerror=alert(1)>", {EVIL: (64, 64), "model.layers.0.<svg onload=a()>": (8, 8)})
        text = make_page(mergeloom.plan({"merge_method": "passthrough", "models": [{"model": str(model)}]}))
    if kind == "stack":
        text = make_page(mergeloom.plan(stacked((llamas["a"], (0, 3)), (llamas["b"], (1, 4)))))
    page = tmp_path / "plan.html"
    page.write_text(text)
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    messages, requests, image = browse(page, tmp_path / "browser", *options)
    assert messages == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert image.stat().st_size > 20_000  # something is drawn
    assert (sum(_background(image)) < 200) == dark


@needs_chromium
def test_errors_and_requests_are_detected(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('oh')</script>")
    messages, requests, _ = browse(page, tmp_path / "browser")
    assert len(messages) == 1
    assert "http://127.0.0.1:9/x.png" in requests


def _background(image: Path) -> tuple[int, ...]:
    """Return the color of a PNG's first pixel, which no filter changes."""
    data = image.read_bytes()
    assert data[24] == 8  # bits per channel
    body, place = b"", 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == b"IDAT":
            body += data[place + 8 : place + 8 + size]
        place += size + 12
    return tuple(zlib.decompress(body)[1:4])


def test_a_plan_of_three_models_of_405b(make_model: MakeModel) -> None:
    base, a, b = (make_model(n, models.llama_3_1_405b(), shard_bytes=10**10, fill=None) for n in ("base", "a", "b"))
    planned: Plan = plan(task_vectors("ties", base, a, b), Options(device="cpu", max_ram=8 << 30))
    text = make_page(planned)
    page = Page(text)
    assert "Read more than once" in page.text
    assert len(text) < 200_000
