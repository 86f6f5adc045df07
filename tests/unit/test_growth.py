"""Work grows in proportion to its size; lines of Python are counted, and `benchmarks.growth` measures the seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth
from tests.support.counting import count_lines

LINES_PER_UNIT = {
    "header": 3,
    "layers": 23,
    "linear": 470,
    "ties_on_gpu": 4_100,
    "stack": 33_000,  # a slice of 64 tensors
    "page": 290,
}
"""The most lines that a task may execute for one more tensor (or slice): half as much again as when it was written."""


@pytest.mark.parametrize("name", growth.TASKS)
def test_twice_the_size_is_twice_the_work(name: str, tmp_path: Path) -> None:
    prepare, size = growth.TASKS[name]
    counts = []
    for n in (size, 2 * size):
        (tmp_path / str(n)).mkdir()
        task = prepare(n, tmp_path / str(n))
        task()  # imports, and whatever else happens once
        counts.append(count_lines(task))
    once, twice = counts
    assert twice <= 2.2 * once
    assert (twice - once) / size <= LINES_PER_UNIT[name]


def test_quadratic_work_is_noticed() -> None:
    def compare_all(size: int) -> None:
        for one in range(size):
            for other in range(size):
                if one == other:
                    break

    once, twice = (count_lines(lambda n=n: compare_all(n)) for n in (50, 100))
    assert twice > 3.5 * once


def test_the_benchmark_measures_both_sizes(tmp_path: Path) -> None:
    sizes: list[int] = []

    def prepare(size: int, directory: Path) -> growth.Task:
        assert directory.is_dir()
        return lambda: sizes.append(size)

    once, twice = growth.measure(prepare, 3, 2, tmp_path)
    assert sizes == [3, 6, 3, 6]
    assert min(once, twice) >= 0
