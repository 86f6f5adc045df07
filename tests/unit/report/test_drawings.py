"""The drawings of the page: one band for a run of layers, scales, letters, colors, and sizes at any width."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import escape
from itertools import combinations
from pathlib import Path

import pytest
import yaml

import mergeloom
from mergeloom import __main__
from mergeloom.engine.cost.machine import Machine
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.report.html.charts import lanes_chart
from mergeloom.report.html.layer_map import InputStack, LayerRun, StackMap
from mergeloom.report.html.origin import Origin, _gpu_names, other_machine, this_machine
from mergeloom.report.html.page import make_page
from mergeloom.report.html.stack_chart import letter, stack_chart
from mergeloom.report.html.svg import NARROW_WIDTH, nice_number, nice_step
from tests.conftest import MakeModel
from tests.support import models
from tests.support.paths import ROOT
from tests.support.plans import linear, slerp, stacked, task_vectors, windows
from tests.support.waiting import HANG_SECONDS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGE = (ROOT / "mergeloom" / "report" / "html" / "page.html").read_text()
DRAWING = re.compile(r'<div class="figure (\w+)">(<svg .*?</svg>)</div>', re.DOTALL)


def drawings(text: str) -> dict[str, list[str]]:
    """Return the drawings of a page for wide and for narrow windows."""
    found: dict[str, list[str]] = {}
    for kind, drawing in DRAWING.findall(text):
        found.setdefault(kind, []).append(drawing)
    return found


def texts(drawing: str, kind: str) -> list[str]:
    """Return the texts of a class."""
    return re.findall(rf'<text [^>]*class="{kind}"[^>]*>([^<]*)</text>', drawing)


def bands(drawing: str) -> list[str]:
    """Return the paths of the bands."""
    return re.findall(r'<path d="([^"]*)" class="band', drawing)


# ------------------------------------------------------------------------------------------------ layer map


def test_a_slice_of_a_complete_model_is_one_band(make_model: MakeModel) -> None:
    model = make_model("a", models.tiny_llama(layers=16), fill=None)
    for recipe in (stacked((model, (0, 16))), stacked(*((model, (n, n + 1)) for n in range(16)))):
        found = drawings(make_page(mergeloom.plan(recipe)))
        assert bands(found["wide"][0]) == ["M0.0 56C0.0 153 0.0 153 0.0 250H1000.0C1000.0 153 1000.0 153 1000.0 56Z"]
        assert bands(found["narrow"][0]) == ["M0.0 56C0.0 153 0.0 153 0.0 250H340.0C340.0 153 340.0 153 340.0 56Z"]
        assert [texts(found[kind][0], "band-label") for kind in ("wide", "narrow")] == [["0-15"], ["0-15"]]


def test_a_complete_mixture_of_experts_is_one_band(make_model: MakeModel) -> None:
    """Its first layers are dense, so they have other tensors than the rest."""
    model = make_model("ds", models.deepseek_v3(experts=4), shard_bytes=10**10, fill=None)
    (wide,) = (drawings(make_page(mergeloom.plan(stacked((model, (0, 61))))))["wide"][:1],)
    assert len(bands(wide[0])) == 1


def test_every_complete_model_of_a_merge_is_one_band(llamas: dict[str, Path]) -> None:
    text = make_page(mergeloom.plan(task_vectors("ties", llamas["base"], llamas["a"], llamas["b"])))
    wide = drawings(text)["wide"][0]
    assert len(bands(wide)) == 3
    assert texts(wide, "band-label") == ["A 0-3", "B 0-3", "C 0-3"]


def test_models_have_letters_and_self_merges_have_layers(make_model: MakeModel, llamas: dict[str, Path]) -> None:
    text = make_page(mergeloom.plan(stacked((llamas["a"], (0, 3)), (llamas["b"], (1, 4)), (llamas["a"], (3, 4)))))
    assert texts(drawings(text)["wide"][0], "band-label") == ["A 0-2", "B 1-3", "A 3"]
    assert f"<b>A</b> {llamas['a']}, 4 layers" in text
    assert f"<b>B</b> {llamas['b']}, 4 layers" in text
    assert f">A {llamas['a']}</td>" in text  # in the table
    model = make_model("self", models.tiny_llama(layers=8), fill=None)
    text = make_page(mergeloom.plan(windows(model, 8, 4, 2)))
    assert texts(drawings(text)["wide"][0], "band-label") == ["0-3", "2-5", "4-7"]


def test_letters() -> None:
    assert [letter(number) for number in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]


@pytest.mark.parametrize("count", [1, 2, 30, 300])
def test_many_inputs_stay_within_the_drawing(count: int) -> None:
    inputs = tuple(InputStack(n, f"org/model-{n}", "model.layers", 32) for n in range(count))
    text = stack_chart(StackMap("model.layers", 32, inputs, tuple(LayerRun(n, 0, 0, 32) for n in range(count))))
    for kind, width in (("wide", 1000.0), ("narrow", float(NARROW_WIDTH))):
        (drawing,) = drawings(text)[kind]
        boxes = re.findall(r'<rect x="([\d.-]+)" [^>]*width="([\d.-]+)"', drawing)
        assert len(boxes) >= count
        assert all(float(x) >= 0 and float(x) + float(size) <= width + 0.2 for x, size in boxes)


# ------------------------------------------------------------------------------------------------ scales


def test_every_chart_has_scales(llamas: dict[str, Path]) -> None:
    recipe = slerp(llamas["base"], llamas["a"], [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.5}])
    found = drawings(make_page(mergeloom.plan(recipe, device="cpu")))
    assert len(found["wide"]) == len(found["narrow"]) == 4  # layers, two curves, RAM
    for kind in ("wide", "narrow"):
        layers, curve, _, memory = found[kind]
        assert texts(layers, "tick") == ["0", "1", "2", "3"] * 3  # two inputs and the output
        assert texts(curve, "tick") == ["0", "0.5", "1", "layer", "0", "1", "2", "3"]
        ticks = texts(memory, "tick")
        assert ticks[:1] == ["0"]
        assert [tick for tick in ticks if tick.endswith("MiB")]
        assert len([tick for tick in ticks if tick.startswith("step ")]) == (5 if kind == "wide" else 3)


def test_a_step_of_many_bytes_is_named_once(make_model: MakeModel) -> None:
    """The first tensor takes most of the columns; the axis doesn't repeat its step."""
    model = make_model("a", {"a.weight": (512, 512), "b.weight": (8, 8), "c.weight": (8, 8)})
    other = make_model("b", {"a.weight": (512, 512), "b.weight": (8, 8), "c.weight": (8, 8)})
    wide = drawings(make_page(mergeloom.plan(linear(model, other), device="cpu")))["wide"][0]
    assert [tick for tick in texts(wide, "tick") if tick.startswith("step ")] == ["step 1", "step 3"]


def test_times_have_a_scale() -> None:
    wide, narrow = (
        drawings(lanes_chart([("read", 85.0, "r"), ("write", 30.0, "w")]))[k][0] for k in ("wide", "narrow")
    )
    assert texts(wide, "tick") == texts(narrow, "tick") == ["0 s", "50 s"]
    short = drawings(lanes_chart([("read", 0.31, "r")]))["wide"][0]
    assert texts(short, "tick") == ["0 s", "0.1 s", "0.2 s", "0.3 s"]
    assert texts(drawings(lanes_chart([("read", 0.0, "r")]))["wide"][0], "name") == ["read"]


def test_nice_steps() -> None:
    assert [nice_step(value) for value in (0.03, 0.05, 0.051, 1, 1.5, 7, 10, 1100)] == [
        0.05,
        0.05,
        0.1,
        1,
        2,
        10,
        10,
        2000,
    ]
    assert [nice_number(value) for value in (0, 0.2, 1, 1.1, 3, 5.1, 99)] == [1, 1, 1, 2, 5, 10, 100]


# ------------------------------------------------------------------------------------------------ colors

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
VISION = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))


def _times(matrix: tuple[tuple[float, ...], ...], vector: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def seen(color: str, vision: str) -> list[float]:
    """Return a color in CIELAB, as it is seen with a kind of color vision."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    rgb = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    rgb = [min(1.0, max(0.0, c)) for c in _times(VISION[vision], rgb)]
    scaled = [c / white for c, white in zip(_times(TO_XYZ, rgb), (0.9505, 1.0, 1.089), strict=True)]
    x, y, z = (c ** (1 / 3) if c > 0.008856 else 7.787 * c + 16 / 116 for c in scaled)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def difference(one: str, other: str, vision: str) -> float:
    """Return the difference of two colors (CIE76); 2.3 is just noticeable."""
    return float(sum((a - b) ** 2 for a, b in zip(seen(one, vision), seen(other, vision), strict=True)) ** 0.5)


def schemes() -> Iterator[dict[str, str]]:
    """Yield the colors of the light and of the dark scheme."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root {(.*?)}", PAGE, re.DOTALL)
    )
    yield light
    yield light | dark


@pytest.mark.parametrize("vision", VISION)
def test_colors_are_distinguishable(vision: str) -> None:
    for colors in schemes():
        models_of_a_map = [colors[f"c{number}"] for number in range(8)]
        charts = [colors[name] for name in ("own", "held", "faint")]
        for group in (models_of_a_map, charts, [colors["accent"], colors["own"]], [colors["accent"], colors["budget"]]):
            for one, other in combinations(group, 2):
                assert difference(one, other, vision) > 12, (vision, one, other)


def test_the_check_of_colors_finds_red_and_green() -> None:
    """Two colors of the same brightness that only people with normal color vision distinguish."""
    assert difference("#b65a50", "#80803f", "normal") > 40
    assert difference("#b65a50", "#80803f", "deuteranopia") < 12


# ------------------------------------------------------------------------------------------------ origin


def test_the_page_names_the_command_the_machine_and_the_date(llamas: dict[str, Path]) -> None:
    planned = plan(linear(llamas["a"], llamas["b"]), Options(machine=Machine(ram=64 << 30, vram=24 << 30, cores=16)))
    origin = Origin("mergeloom plan 'my <soup>.yml'", "AMD EPYC, 2 cores", "2026-11-21 10:00 UTC")
    text = make_page(planned, origin=origin)
    facts = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text.partition("</header>")[0])
    assert facts == [
        ("command", "<code>mergeloom plan &#x27;my &lt;soup&gt;.yml&#x27;</code>"),
        ("planned for", "64GiB RAM, 1 GPU with 24GiB, 16 cores"),
        ("machine", "AMD EPYC, 2 cores"),
        ("date", "2026-11-21 10:00 UTC"),
    ]


def test_the_command_writes_its_own_arguments(llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe, file = tmp_path / "my recipe.yml", tmp_path / "plan.html"
    recipe.write_text(yaml.safe_dump(linear(llamas["a"], llamas["b"])))
    assert __main__.main(["plan", str(recipe), "--html", str(file)]) == 0
    head = file.read_text().partition("</header>")[0]
    assert f"<code>mergeloom plan &#x27;{recipe}&#x27; --html {file}</code>" in head
    assert f"<dd>{this_machine()}</dd>" in head
    assert re.search(r"<dd>\d{4}-\d\d-\d\d \d\d:\d\d UTC</dd>", head)


def test_machines(tmp_path: Path) -> None:
    assert re.search(r", \d+ cores?, [\d.]+GiB RAM, ", this_machine())
    assert other_machine(Machine(ram=1 << 30, cores=1)) == "1GiB RAM, no GPU, 1 core"
    assert _gpu_names(tmp_path) == []
    for number in (0, 1):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        (tmp_path / f"0000:0{number}:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    assert _gpu_names(tmp_path) == ["NVIDIA H200", "NVIDIA H200"]


# ------------------------------------------------------------------------------------------------ in a browser

_MEASURE = """<script>
const sizes = [...document.querySelectorAll("svg")].filter(svg => svg.clientWidth).flatMap(svg =>
  [...svg.querySelectorAll("text")].map(text =>
    parseFloat(getComputedStyle(text).fontSize) * svg.clientWidth / svg.viewBox.baseVal.width));
parent.document.title = JSON.stringify({
  width: document.documentElement.scrollWidth, texts: sizes.length, smallest: Math.min(...sizes)});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium isn't installed")
@pytest.mark.parametrize("width", [400, 700, 1600])
def test_the_page_is_readable_at_any_width(width: int, llamas: dict[str, Path], tmp_path: Path) -> None:
    assert CHROMIUM is not None
    recipe = slerp(llamas["base"], llamas["a"], [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.5}])
    text = make_page(
        mergeloom.plan(recipe, device="cpu"), origin=Origin("mergeloom plan " + "x" * 200, "m" * 90, "today")
    )
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace(
        "</body>", f"{_MEASURE}</body>"
    )
    page = tmp_path / "page.html"  # a frame: Chromium's own window is never narrower than 500 pixels
    page.write_text(f'<iframe srcdoc="{escape(text)}" style="width: {width}px; height: 900px; border: 0"></iframe>')
    ended = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1700,1000", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    title = re.search(r"<title>(.*?)</title>", ended.stdout)
    assert title is not None
    measured = json.loads(title[1])
    assert measured["width"] <= width  # nothing is scrolled sideways
    assert measured["texts"] > 30
    assert measured["smallest"] >= 10
