"""Extractions within a budget: the peak of the process, what is read, and the libraries that are loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeloom.engine.execute.ledger import Ledger
from mergeloom.engine.run.extract import decompose, extraction
from mergeloom.engine.run.extract.extraction import Extraction
from mergeloom.engine.run.extract.options import ExtractOptions
from tests.support.command_line import spawn
from tests.support.extraction.matrices import noise, save_models
from tests.support.models import quantized

ROWS, COLUMNS = 3000, 2500
PASSES = 8
"""How often a large matrix is needed: for the sketch, three power iterations of two products, and the last product."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its base in bfloat16, whose matrices have 30 MB in float32."""
    base = {
        "model.layers.0.up_proj.weight": noise(1, ROWS, COLUMNS),
        "model.layers.0.down_proj.weight": noise(2, COLUMNS, ROWS),
        "model.norm.weight": noise(3, 1, COLUMNS)[0],
    }
    delta = {
        name: noise(4, *value.reshape(-1, value.shape[-1]).shape, 0.1).reshape(value.shape)
        for name, value in base.items()
    }
    return save_models(tmp_path_factory.mktemp("models"), base, delta, torch.bfloat16)


def extract(models: tuple[Path, Path], out: Path, *options: str) -> dict[str, Any]:
    """Extract an adapter in a process of its own, and return the report."""
    report = out.with_suffix(".json")
    ended = spawn("extract-lora", *models, out, "--rank", 16, "--quiet", "--report", report, *options)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def smallest(models: tuple[Path, Path], out: Path) -> str:
    """The smallest budget that works, as the error names it."""
    refused = spawn("extract-lora", *models, out, "--rank", 16, "--max-ram", "1MiB")
    assert refused.returncode == 3, refused.stderr
    match = re.search(r"use --max-ram ([\d.]+[KMG]iB) or more", refused.stderr)
    assert match is not None, refused.stderr
    return match[1]


def test_the_smallest_budget_works_and_makes_the_same_bytes(models: tuple[Path, Path], tmp_path: Path) -> None:
    large = extract(models, tmp_path / "large", "--max-ram", "2GiB")
    small = extract(models, tmp_path / "small", "--max-ram", smallest(models, tmp_path / "small"))
    for report in (large, small):
        measured = report["measured"]
        assert measured["peak_rss"] <= measured["peak_ram"] <= measured["max_ram"]
    matrices, norm = 2 * 2 * ROWS * COLUMNS * 2, 2 * COLUMNS * 2
    assert large["measured"]["bytes_read"] == matrices + norm
    assert small["measured"]["bytes_read"] == PASSES * matrices + norm
    assert small["measured"]["peak_ram"] < large["measured"]["peak_ram"]
    found, expected = ((tmp_path / each / "adapter_model.safetensors").read_bytes() for each in ("small", "large"))
    assert found == expected


def test_the_headline_says_what_is_read(models: tuple[Path, Path], tmp_path: Path) -> None:
    small = spawn("extract-lora", *models, tmp_path / "a", "--rank", 16, "--max-ram", smallest(models, tmp_path / "a"))
    assert "times, since matrices exceed the budget" in small.stderr
    large = spawn("extract-lora", *models, tmp_path / "b", "--rank", 16)
    assert "(no re-reads)" in large.stderr
    assert "2 matrices to rank 16 (0 by exact SVD, 2 by randomized SVD), 1 tensor in full if changed" in large.stderr


@pytest.mark.parametrize("form", ["stored", "fp8 blocks", "int4"])
@pytest.mark.parametrize("panels", [False, True])
def test_planned_bytes_are_read_and_reserved_memory_is_within_the_plan(
    models: tuple[Path, Path], tmp_path: Path, form: str, panels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompose, "EXACT_SIDE", 8)
    ledgers: list[Ledger] = []

    class Recorded(Ledger):
        def __init__(self) -> None:
            super().__init__()
            ledgers.append(self)

    monkeypatch.setattr(extraction, "Ledger", Recorded)
    if form == "stored":
        pair = models
    else:
        (base, _), (model, _) = (quantized.write_pair(tmp_path, form, seed) for seed in (1, 2))
        pair = model, base
    if panels:
        from mergeloom.engine.run.extract.memory import Memory

        monkeypatch.setattr(Memory, "panel_rows", lambda self, job: min(256, job.rows))
    extracted = Extraction(*pair, tmp_path / "out", ExtractOptions(rank=4), threads=2)
    result = extracted.run()
    assert result.bytes_read == extracted.bytes_to_read
    (ledger,) = ledgers
    assert 0 < ledger.peak() <= extracted.memory.peak - extracted.memory.baseline
    assert ledger.held() == 0


def test_an_extraction_loads_no_torch(models: tuple[Path, Path], tmp_path: Path) -> None:
    code = "import sys; from mergeloom.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    arguments = ["extract-lora", *map(str, models), str(tmp_path / "out"), "--rank", "2", "--include", "norm|up"]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "adapter_config.json").exists()
