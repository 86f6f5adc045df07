"""Decompositions of a matrix: exact and randomized, against numpy's SVD in float64."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mergeloom.engine.run.diff.computed import ComputedTensors
from mergeloom.engine.run.extract import decompose as decomposition
from mergeloom.engine.run.extract.decompose import Factors, decompose, is_exact, sketch_columns
from mergeloom.engine.run.extract.deltas import TILE_BYTES, Delta, Workers
from mergeloom.engine.run.extract.targets import Difference, Layer, MatrixJob
from mergeloom.engine.run.extract.values import ValueReader, Workspace
from mergeloom.io.tensors.dtypes import F32
from mergeloom.io.tensors.refs import TensorRef
from tests.support.extraction.matrices import Floats, low_rank, noise, optimum, relative_error

NAME = "layers.0.q.weight"


def factors_of(matrix: Floats, rank: int, seed: int = 0, name: str = NAME) -> Factors | None:
    """Decompose a matrix that is stored as the difference to zeros."""
    rows, columns = matrix.shape
    data = matrix.astype(np.float32).tobytes()

    def read(file: Path, offset: int, buffer: memoryview) -> None:
        source = data if file.name == "model" else bytes(len(data))
        buffer[:] = source[offset : offset + len(buffer)]

    refs = [TensorRef(Path(each), 0, len(data), F32, (rows, columns)) for each in ("base", "model")]
    job = MatrixJob(Difference(NAME, *refs), "layers.0.q", Layer.LINEAR, rank, rank)
    with ThreadPoolExecutor(2) as pool:
        reader = ValueReader(read, ComputedTensors(("base", "model")))
        workers = Workers(pool, reader, queue.SimpleQueue(), queue.SimpleQueue(), lambda nbytes: None)
        for _ in range(2):
            workers.workspaces.put(Workspace(0, 0))
            workers.tiles.put(np.empty(TILE_BYTES // 8))
        return decompose(Delta(job, workers, rows), rank, seed, name)


def product(factors: Factors | None) -> Floats:
    """The product of both factors in float64."""
    assert factors is not None
    return cast(Any, factors.left.astype(np.float64) @ factors.right.astype(np.float64))


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (90, 1), (60, 90), (512, 600), (700, 513), (513, 2100)])
def test_a_matrix_of_the_rank_is_recovered(shape: tuple[int, int]) -> None:
    rank = min(5, *shape)
    matrix = low_rank(1, *shape, rank).astype(np.float32).astype(np.float64)
    found = factors_of(matrix, rank)
    assert found is not None
    assert relative_error(product(found), matrix) <= 1e-6
    assert found.error <= 1e-6


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 2.0])
def test_randomized_factors_are_near_the_optimum(power: float) -> None:
    matrix = noise(3, 700, 900) * (1 + np.arange(900)) ** -power
    best = optimum(matrix.astype(np.float32).astype(np.float64), 20)
    found = factors_of(matrix, 20)
    assert not is_exact(*matrix.shape)
    assert found is not None
    assert 0.97 * best <= found.retained_energy <= best * (1 + 1e-9)
    assert found.error == pytest.approx(relative_error(product(found), matrix), rel=1e-5)


def test_a_matrix_without_decay_is_the_worst_case() -> None:
    matrix = noise(4, 700, 900)
    found = factors_of(matrix, 20)
    assert found is not None
    assert found.retained_energy >= 0.85 * optimum(matrix, 20)


def test_power_iterations_lower_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = noise(5, 700, 900) * (1 + np.arange(900)) ** -0.25
    errors = []
    for iterations in (0, 1, 3):
        monkeypatch.setattr(decomposition, "POWER_ITERATIONS", iterations)
        found = factors_of(matrix, 20)
        assert found is not None
        errors.append(found.error)
    assert errors[0] > errors[1] > errors[2]


def test_a_sketch_that_spans_the_range_is_exact() -> None:
    matrix = noise(6, 530, 2000)
    assert sketch_columns(530, 2000, 520) == 530
    found = factors_of(matrix, 520)
    assert found is not None
    assert found.retained_energy == pytest.approx(optimum(matrix.astype(np.float32).astype(np.float64), 520), rel=1e-9)


def test_seed_and_name_choose_the_sketch() -> None:
    matrix = noise(7, 600, 800)
    first, same, other_seed, other_name = (
        factors_of(matrix, 4, seed, name) for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    )
    assert first is not None
    assert other_seed is not None
    assert other_name is not None
    assert same is not None
    np.testing.assert_array_equal(first.left, same.left)
    assert not np.array_equal(first.left, other_seed.left)
    assert not np.array_equal(first.left, other_name.left)


def test_signs_are_balanced_and_independent() -> None:
    signs = decomposition._signs(0, "x", 4000, 70)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert np.abs(signs.mean(axis=0)).max() < 0.1
    correlations = signs.T @ signs / len(signs) - np.eye(70)
    assert np.abs(correlations).max() < 0.1


@pytest.mark.parametrize("shape", [(30, 40), (600, 700)])
def test_zeros_have_no_factors(shape: tuple[int, int]) -> None:
    assert factors_of(np.zeros(shape), 4) is None


def test_a_matrix_of_fewer_dimensions_than_the_rank_has_finite_factors() -> None:
    for shape in ((60, 70), (600, 700)):
        found = factors_of(low_rank(8, *shape, 2), 10)
        assert found is not None
        assert np.isfinite(found.left).all()
        assert np.isfinite(found.right).all()
        assert found.error <= 1e-6
