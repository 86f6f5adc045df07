"""The factors of extracted adapters: values, errors, names, and what they do not depend on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mergeloom
from tests.support.command_line import run
from tests.support.extraction.matrices import (
    adapter_config,
    adapter_tensors,
    low_rank,
    noise,
    optimum,
    product,
    relative_error,
    save_models,
    stored_delta,
)
from tests.support.models import encoder_dir, fine_tuned_encoder_dir, quantized

SHAPES = {"small": (96, 160), "large": (1100, 700), "tall": (1500, 640), "one row": (1, 64)}


@pytest.mark.parametrize("shape", ["small", "large", "tall"])
def test_an_adapter_is_recovered_at_its_rank(tmp_path: Path, shape: str) -> None:
    rows, columns = SHAPES[shape]
    base = {"model.layers.0.q_proj.weight": noise(1, rows, columns, 0.02)}
    delta = low_rank(2, rows, columns, 8)
    model, origin = save_models(tmp_path, base, dict.fromkeys(base, delta))
    result = mergeloom.extract_lora(model, origin, tmp_path / "out", rank=8)
    assert relative_error(product(tmp_path / "out", "model.layers.0.q_proj"), delta) <= 1e-5
    assert result.matrices[0].error <= 1e-5
    assert result.matrices[0].method == ("exact" if shape == "small" else "randomized")


@pytest.mark.parametrize("shape", ["small", "large", "tall"])
def test_errors_are_those_of_the_product_and_the_smallest_possible(tmp_path: Path, shape: str) -> None:
    rows, columns = SHAPES[shape]
    name = "model.layers.0.q_proj.weight"
    decaying = noise(2, rows, columns, 1e-3) * (1 + np.arange(columns)) ** -0.5
    model, base = save_models(tmp_path, {name: noise(1, rows, columns, 0.02)}, {name: decaying}, torch.bfloat16)
    result = mergeloom.extract_lora(model, base, tmp_path / "out", rank=16)
    delta = stored_delta(model, base, name)
    (matrix,) = result.matrices
    assert matrix.error == pytest.approx(relative_error(product(tmp_path / "out", "model.layers.0.q_proj"), delta))
    assert matrix.norm == pytest.approx(float(np.linalg.norm(delta)))
    best = optimum(delta, 16)
    assert best * 0.98 <= matrix.retained_energy <= best * (1 + 1e-9)
    if matrix.method == "exact":
        assert matrix.retained_energy == pytest.approx(best, rel=1e-9)


def test_both_factors_have_the_square_roots_of_the_singular_values(tmp_path: Path) -> None:
    name = "model.layers.0.q_proj.weight"
    model, base = save_models(tmp_path, {name: noise(1, 90, 60)}, {name: noise(2, 90, 60, 0.1)})
    mergeloom.extract_lora(model, base, tmp_path / "out", rank=5)
    values = np.linalg.svd(stored_delta(model, base, name), compute_uv=False)[:5]
    tensors = adapter_tensors(tmp_path / "out")
    a, b = (tensors[f"model.layers.0.q_proj.lora_{each}.weight"].double().numpy() for each in "AB")
    np.testing.assert_allclose(a @ a.T, np.diag(values), atol=1e-6)
    np.testing.assert_allclose(b.T @ b, np.diag(values), atol=1e-6)


def test_the_real_encoder_retains_what_its_singular_values_predict(tmp_path: Path) -> None:
    model, base = fine_tuned_encoder_dir(), encoder_dir()
    result = mergeloom.extract_lora(model, base, tmp_path / "out", rank=16, include=[r"layer\.[05]\.", "position"])
    assert len(result.matrices) == 12
    for matrix in result.matrices:
        delta = stored_delta(model, base, matrix.name)
        assert matrix.retained_energy == pytest.approx(optimum(delta, 16), rel=1e-6)
        found = product(tmp_path / "out", matrix.name.removesuffix(".weight"))
        assert matrix.error == pytest.approx(relative_error(found, delta), rel=1e-5)
    squares = sum(matrix.norm**2 for matrix in result.matrices)
    retained = sum(matrix.retained_energy * matrix.norm**2 for matrix in result.matrices)
    assert result.retained_energy == pytest.approx(retained / squares)


def test_embeddings_of_the_real_encoder_get_factors_near_the_optimum(tmp_path: Path) -> None:
    model, base = fine_tuned_encoder_dir(), encoder_dir()
    result = mergeloom.extract_lora(model, base, tmp_path / "out", rank=16, include=["word_embeddings"], embed=True)
    (matrix,) = result.matrices
    delta = stored_delta(model, base, matrix.name)
    values = np.linalg.eigvalsh(delta.T @ delta)
    best = values[-16:].sum() / values.sum()
    assert matrix.method == "randomized"
    assert best * 0.99 <= matrix.retained_energy <= best * (1 + 1e-9)
    tensors = adapter_tensors(tmp_path / "out")
    a, b = (tensors[f"embeddings.word_embeddings.lora_embedding_{each}"].double().numpy() for each in "AB")
    assert (a.shape, b.shape) == ((16, len(delta)), (delta.shape[1], 16))
    assert relative_error((b @ a).T, delta) == pytest.approx(matrix.error, rel=1e-5)


def test_unchanged_matrices_are_left_out_and_counted(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.q_proj.weight" for layer in range(4)]
    base = {name: noise(seed, 32, 24) for seed, name in enumerate(names)}
    model, origin = save_models(tmp_path, base, {names[1]: noise(9, 32, 24, 0.1)})
    result = mergeloom.extract_lora(model, origin, tmp_path / "out", rank=4)
    assert [matrix.name for matrix in result.matrices] == [names[1]]
    assert result.unchanged == 3
    assert {name.rpartition(".lora_")[0] for name in adapter_tensors(tmp_path / "out")} == {"model.layers.1.q_proj"}
    assert adapter_config(tmp_path / "out")["target_modules"] == ["model.layers.1.q_proj"]


def test_matrices_with_a_shorter_side_have_a_smaller_rank(tmp_path: Path) -> None:
    base = {"model.layers.0.q_proj.weight": noise(1, 32, 24), "model.layers.0.gate_proj.weight": noise(2, 3, 24)}
    delta = {name: noise(7, *value.shape, 0.1) for name, value in base.items()}
    model, origin = save_models(tmp_path, base, delta)
    mergeloom.extract_lora(model, origin, tmp_path / "out", rank=8)
    config = adapter_config(tmp_path / "out")
    ranks = {r"model\.layers\.0\.gate_proj": 3}
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks
    tensors = adapter_tensors(tmp_path / "out")
    assert tensors["model.layers.0.gate_proj.lora_A.weight"].shape == (3, 24)
    assert (
        relative_error(product(tmp_path / "out", "model.layers.0.gate_proj"), delta["model.layers.0.gate_proj.weight"])
        < 1e-5
    )


def test_include_and_exclude_choose_tensors(tmp_path: Path) -> None:
    base = {f"model.layers.{n}.{each}_proj.weight": noise(n, 16, 16) for n in range(2) for each in "qkv"}
    model, origin = save_models(tmp_path, base, {name: noise(5, 16, 16, 0.1) for name in base})
    result = mergeloom.extract_lora(
        model, origin, tmp_path / "out", rank=2, include=[r"\.q_proj", r"\.k_proj"], exclude=[r"layers\.1\.k"]
    )
    found = {matrix.name for matrix in result.matrices}
    assert found == {f"model.layers.{each}_proj.weight" for each in ("0.q", "0.k", "1.q")}
    assert result.excluded == 3


@pytest.mark.parametrize("form", ["fp8 blocks", "int4", "mxfp4"])
def test_quantized_models_give_the_adapter_of_their_values(tmp_path: Path, form: str) -> None:
    (base, base_values), (model, values) = (quantized.write_pair(tmp_path, form, seed) for seed in (1, 2))
    for name, pair in (("quantized", (model, base)), ("values", (values, base_values))):
        mergeloom.extract_lora(*pair, tmp_path / name, rank=4, low_rank_only=True)
    found, expected = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("quantized", "values"))
    assert found == expected


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", ["stored", "fp8 blocks"])
def test_bytes_do_not_depend_on_panels_or_threads(
    tmp_path: Path, threads: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix that doesn't fit is read in panels of rows, and several times."""
    from mergeloom.engine.run.extract import decompose, deltas, values
    from mergeloom.engine.run.extract.memory import Memory

    if form == "stored":
        base = {"model.layers.0.q_proj.weight": noise(1, 700, 333)}
        model, origin = save_models(tmp_path, base, {name: noise(2, 700, 333, 0.1) for name in base})
    else:
        (origin, _), (model, _) = (quantized.write_pair(tmp_path, form, seed) for seed in (1, 2))
    monkeypatch.setattr(decompose, "EXACT_SIDE", 8)
    monkeypatch.setattr(values, "CHUNK", 1 << 15)
    for name in ("TILE_ROWS", "TILE_COLUMNS"):
        monkeypatch.setattr(deltas, name, 32)
    whole = mergeloom.extract_lora(model, origin, tmp_path / "whole", rank=4, low_rank_only=True, threads=1)
    monkeypatch.setattr(Memory, "panel_rows", lambda self, job: min(64, job.rows))
    panels = mergeloom.extract_lora(model, origin, tmp_path / "panels", rank=4, low_rank_only=True, threads=threads)
    found, expected = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("panels", "whole"))
    assert found == expected
    assert panels.bytes_read >= 2 * whole.bytes_read


def test_bytes_depend_on_the_seed(tmp_path: Path) -> None:
    base = {"model.layers.0.q_proj.weight": noise(1, 700, 800)}
    model, origin = save_models(tmp_path, base, {name: noise(2, 700, 800, 0.1) for name in base})
    for seed in (0, 1):
        mergeloom.extract_lora(model, origin, tmp_path / f"out{seed}", rank=4, seed=seed)
    a, b = ((tmp_path / f"out{seed}" / "adapter_model.safetensors").read_bytes() for seed in (0, 1))
    assert a != b


def test_the_report_has_the_error_of_each_matrix(tmp_path: Path) -> None:
    base = {"model.layers.0.q_proj.weight": noise(1, 40, 30), "model.norm.weight": noise(3, 1, 30)[0]}
    delta = {name: noise(2, *np.atleast_2d(value).shape, 0.1).reshape(value.shape) for name, value in base.items()}
    model, origin = save_models(tmp_path, base, delta)
    ended = run("extract-lora", model, origin, tmp_path / "out", "--rank", 3, "--report", tmp_path / "report.json")
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    (matrix,) = report["matrices"]
    found = stored_delta(model, origin, matrix["name"])
    assert matrix["retained_energy"] == pytest.approx(optimum(found, 3), rel=1e-9)
    assert matrix["error"] == pytest.approx((1 - matrix["retained_energy"]) ** 0.5)
    assert report["saved"] == ["model.norm.weight"]
    assert report["measured"]["bytes_read"] == 2 * 4 * (40 * 30 + 30)
    assert "retained energy" in ended.stdout
    again = run("extract-lora", model, origin, tmp_path / "again", "--rank", 3, "--report", tmp_path / "report.json")
    assert again.returncode == 0, again.stderr  # its own report is replaced


def test_inspect_recognizes_the_adapter(tmp_path: Path) -> None:
    """It has factors, biases next to them, and modules that are saved in full."""
    mergeloom.extract_lora(fine_tuned_encoder_dir(), encoder_dir(), tmp_path / "out", rank=4, exclude=["embeddings"])
    ended = run("inspect", tmp_path / "out", "--json")
    assert ended.returncode == 0, ended.stderr
    content = json.loads(ended.stdout)["content"]
    assert (content["kind"], content["adapter"]["kind"], content["adapter"]["ranks"]) == ("adapter", "LoRA", [4])


def warnings_at(directory: Path, energy: float, rank: int) -> tuple[str, ...]:
    """The warnings of an extraction at a rank that keeps this share of the squared singular values of two matrices."""
    rows, columns = 48, 40
    base = {f"model.layers.{layer}.q_proj.weight": noise(layer, rows, columns, 0.02) for layer in range(2)}
    squares = np.full(columns, (1 - energy) / (columns - rank))
    squares[:rank] = energy / rank
    left, right = (np.linalg.qr(noise(seed, size, columns))[0] for seed, size in ((7, rows), (8, columns)))
    delta = (left * np.sqrt(squares)) @ right.T
    models = save_models(directory, base, dict.fromkeys(base, delta))
    return mergeloom.extract_lora(*models, directory / "out", rank=rank).warnings


@pytest.mark.parametrize(("energy", "shown"), [(0.12, "12.00%"), (0.245, "24.50%"), (0.255, ""), (0.9, "")])
def test_a_warning_gives_a_low_retained_energy(tmp_path: Path, energy: float, shown: str) -> None:
    """The best factors of rank 2 keep this share of the singular values that the test chooses."""
    expected = (
        f"the factors keep only {shown} of the change from BASE to MODEL (retained energy of all matrices, less than "
        "25%): check that MODEL was fine-tuned from BASE, since unrelated models differ in all directions; if it was, "
        "use a higher --rank"
    )
    assert warnings_at(tmp_path, energy, 2) == ((expected,) if shown else ())


def test_unrelated_models_cause_a_warning_on_every_run(tmp_path: Path) -> None:
    base = {f"model.layers.{layer}.q_proj.weight": noise(layer, 300, 200) for layer in range(2)}
    models = save_models(tmp_path, base, {name: noise(9 + layer, 300, 200) for layer, name in enumerate(base)})
    deltas = [np.linalg.svd(stored_delta(*models, name), compute_uv=False) ** 2 for name in base]
    kept = sum(values[:8].sum() for values in deltas) / sum(values.sum() for values in deltas)
    for _ in ("extracted", "already complete"):
        ended = run("extract-lora", *models, tmp_path / "out", "--rank", 8)
        assert ended.returncode == 0
        assert f"warning: the factors keep only {kept:.2%} of the change from BASE to MODEL" in ended.stderr
        assert ended.stderr.count("the factors keep only") == 1
