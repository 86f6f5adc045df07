"""Values that are computed from parts: their comparison is that of models that store the values."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from mergeloom.engine.model.formats import registry
from mergeloom.engine.run.diff import compare as module
from mergeloom.engine.run.diff import units
from mergeloom.engine.run.diff.compare import Comparison
from mergeloom.engine.run.diff.result import Diff, NotCompared, Similarity
from mergeloom.engine.run.diff.units import BUFFER_BYTES
from mergeloom.errors import BudgetError
from mergeloom.io.reading import Reader
from tests.support.models import write_checkpoint
from tests.unit.diff.parts import BLOCK, COLUMNS, RANK, ROWS, find, make
from tests.unit.diff.references import is_close, reference

Models = tuple[Path, Path]


@pytest.fixture(autouse=True)
def format_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FORMATS, "test", find)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Models]:
    """Two models, each with the one that stores its values."""
    root, pairs = tmp_path_factory.mktemp("models"), []
    for seed in (1, 2):
        stored, values = make(seed)
        pairs.append(
            (write_checkpoint(root / f"parts{seed}", stored), write_checkpoint(root / f"values{seed}", values))
        )
    return pairs


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the size of everything that comparisons read."""
    found: list[int] = []
    lock = threading.Lock()

    def observe(file: Path, offset: int, data: memoryview) -> None:
        with lock:
            found.append(len(data))

    monkeypatch.setattr(module, "Reader", partial(Reader, observe=observe))
    return found


def similarities(diff: Diff) -> dict[str, Similarity]:
    return {tensor.name: tensor.similarity for tensor in diff.tensors}


@pytest.mark.parametrize(("buffer", "threads"), [(1, 3), (700_000, 1), (BUFFER_BYTES, 3)])
def test_a_model_equals_the_one_that_stores_its_values(
    pairs: list[Models], buffer: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "BUFFER_BYTES", buffer)
    for a, b in (pairs[0], reversed(pairs[0])):
        found = Comparison(a, b, threads=threads).run()
        assert found.equal
        assert similarities(found).keys() == make(1)[1].keys()
    assert found.bytes_read == Comparison(*reversed(pairs[0]), threads=threads).bytes_to_read


@pytest.mark.parametrize(("buffer", "threads"), [(1, 3), (700_000, 1)])
def test_distances_are_those_of_the_values(
    pairs: list[Models], reads: list[int], buffer: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Comparison(pairs[0][1], pairs[1][1]).run()
    reads.clear()
    monkeypatch.setattr(units, "BUFFER_BYTES", buffer)
    comparison = Comparison(pairs[0][0], pairs[1][0], threads=threads)
    found = comparison.run()
    assert similarities(found) == similarities(stored)
    for name, value in make(1)[1].items():
        other = make(2)[1][name]
        assert similarities(found)[name].equal == int((value == other).sum())
        assert name == "integers" or is_close(similarities(found)[name], reference(value, other)), name
    assert found.bytes_read == comparison.bytes_to_read == sum(reads)
    formats = {tensor.name: (tensor.formats, tensor.dtypes) for tensor in found.tensors}
    assert formats["scaled"] == (("toy scaled",) * 2, ("F32", "F32"))
    assert formats["integers"] == (("slice",) * 2, ("I64", "I64"))
    assert formats["plain"] == (("", ""), ("F32", "F32"))


def test_only_what_the_values_need_is_read(tmp_path: Path, reads: list[int]) -> None:
    stored, values = make(1)
    for name, nbytes in (("sliced", 4 * ROWS * COLUMNS), ("gathered", 2 * (ROWS - ROWS // 6) * COLUMNS)):
        parts = {part: stored[part] for part in ("fused" if name == "sliced" else "gathered.rows",)}
        a, b = (
            write_checkpoint(tmp_path / f"{name}a", parts),
            write_checkpoint(tmp_path / f"{name}b", {name: values[name]}),
        )
        reads.clear()
        assert Comparison(a, b).run().equal
        assert sum(reads) == nbytes + values[name].nbytes


def test_a_model_and_itself_are_read_once(pairs: list[Models]) -> None:
    itself, twice = Comparison(pairs[0][0], pairs[0][0]).run(), Comparison(pairs[0][0], pairs[1][0]).run()
    assert itself.equal
    assert 2 * itself.bytes_read == twice.bytes_read


def test_nan_in_a_part_is_one_in_every_value_that_it_scales(tmp_path: Path) -> None:
    stored, values = make(1)
    stored["scaled.scales"][3, 1] = float("nan")
    parts = {name: stored[name] for name in ("scaled.codes", "scaled.scales")}
    a, b = write_checkpoint(tmp_path / "a", parts), write_checkpoint(tmp_path / "b", {"scaled": values["scaled"]})
    found = Comparison(a, b).run()
    assert found.tensors[0].similarity.nonfinite == BLOCK[0] * BLOCK[1]
    assert found.tensors[0].similarity.equal == ROWS * COLUMNS - BLOCK[0] * BLOCK[1]
    assert "left out of distances and cosines: 350 elements of 1 tensor, first in scaled" in found.warnings[0]


def test_integers_that_no_loop_can_turn_are_listed(tmp_path: Path) -> None:
    for name in "ab":
        write_checkpoint(
            tmp_path / name, {"turned.pairs": torch.ones(COLUMNS, 2 * ROWS, dtype=torch.int64), "w": torch.ones(3)}
        )
    found = Comparison(tmp_path / "a", tmp_path / "b").run()
    assert found.not_compared == (NotCompared("turned", "dtype F32 in A, F32 in B"),)


def test_the_memory_to_decode_with_is_planned(pairs: list[Models], tmp_path: Path) -> None:
    comparison = Comparison(*pairs[0], threads=2)
    memory, computed = comparison._memory, comparison._pairing.computed
    assert memory.decoding == computed.scratch + computed.allocated > 0
    assert memory.peak == memory.baseline + 2 * (memory.buffer + memory.sums + memory.decoding + units.WORKSPACE_BYTES)
    whole = next(unit for unit in comparison._units if unit.tensors[0].elements and len(unit.refs) == 4)
    assert whole.size(1) - whole.layout(1)[-1] >= 4 * units.BLOCK + 2 * RANK * COLUMNS  # base and A of the adapted one
    with pytest.raises(BudgetError, match="the smallest budget that works is"):
        Comparison(*pairs[0], max_ram=comparison._memory.baseline)
    plain = write_checkpoint(tmp_path / "a", {"w": torch.ones(3)})
    assert Comparison(plain, plain)._memory.decoding == 0
