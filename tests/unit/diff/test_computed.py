"""Values that are computed from parts: their comparison is that of models that store the values."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeloom.engine.model.formats import registry
from mergeloom.engine.model.logical import Decode, LogicalTensor, Part
from mergeloom.engine.run.diff import compare as module
from mergeloom.engine.run.diff import units
from mergeloom.engine.run.diff.compare import Comparison
from mergeloom.engine.run.diff.result import Diff, NotCompared, Similarity
from mergeloom.engine.run.diff.units import BUFFER_BYTES
from mergeloom.errors import BudgetError
from mergeloom.io.checkpoint.checkpoint import Checkpoint
from mergeloom.io.reading import Reader
from mergeloom.io.tensors.dtypes import DTYPES, F32, F64
from mergeloom.methods.kernel.access import (
    ALIGNED,
    Access,
    BlockRows,
    GatheredRows,
    SameRows,
    Slice,
    TransposedSlice,
    Whole,
)
from tests.support.models import toy_format, write_checkpoint
from tests.unit.diff.references import is_close, reference

ROWS, COLUMNS, RANK = 300, 257, 3
"""Shape of every value: more than two blocks, whose boundaries lie within rows."""
ORDER = tuple((7 * row + 3) % ROWS if row % 6 else -1 for row in range(ROWS))
BLOCK = (7, 50)
Models = tuple[Path, Path]


def find(checkpoint: Checkpoint) -> Iterator[LogicalTensor]:
    """The values of a model that `write` wrote."""
    stored = checkpoint.tensors

    def value(name: str, *parts: tuple[str, Access], decode: Decode | None = None) -> Iterator[LogicalTensor]:
        made = tuple(Part(part, stored[part], access) for part, access in parts if part in stored)
        if made:
            dtype = DTYPES["I64"] if name == "integers" else F64 if name == "wide" else F32
            yield LogicalTensor(name, (ROWS, COLUMNS), dtype, made, decode)

    aligned, scaled = ALIGNED, Decode(toy_format.SCALED)
    yield from value("scaled", ("scaled.codes", aligned), ("scaled.scales", BlockRows(*BLOCK)), decode=scaled)
    yield from value("wide", ("wide.codes", aligned), ("wide.scales", BlockRows(*BLOCK)), decode=scaled)
    parts = ("adapted.base", aligned), ("adapted.b", SameRows()), ("adapted.a", Whole())
    yield from value("adapted", *parts, decode=Decode(toy_format.ADAPTED))
    yield from value("gathered", ("gathered.rows", GatheredRows(ORDER)))
    yield from value("sliced", ("fused", Slice(5, 2 * COLUMNS + 3)))
    yield from value("turned", ("turned.pairs", TransposedSlice(1, 2 * ROWS, 2)))
    yield from value("integers", ("integers.all", Slice(COLUMNS, COLUMNS)))


def make(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a model of every access stores, and its values."""
    random = torch.Generator().manual_seed(seed)

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randint(-4, 5, shape, generator=random).to(dtype)

    stored, values = {}, {}
    for name, dtype in (("scaled", torch.float32), ("wide", torch.float64)):
        codes, scales = numbers(ROWS, COLUMNS), 2 ** numbers(-(-ROWS // BLOCK[0]), -(-COLUMNS // BLOCK[1]))
        scales = scales.to(dtype) * (1 + 2.0**-40 if dtype == torch.float64 else 1)
        stored |= {f"{name}.codes": codes.bfloat16(), f"{name}.scales": scales}
        values[name] = codes * scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[:ROWS, :COLUMNS]
    base, b, a = numbers(ROWS, COLUMNS), numbers(ROWS, RANK), numbers(RANK, COLUMNS)
    stored |= {"adapted.base": base, "adapted.b": b, "adapted.a": a.bfloat16()}
    values["adapted"] = base + b @ a
    stored["gathered.rows"] = table = numbers(ROWS, COLUMNS).half()
    values["gathered"] = torch.stack([table[row] if row >= 0 else table[0] * 0 for row in ORDER])
    stored["fused"] = fused = numbers(ROWS + 1, 2 * COLUMNS + 3)
    values["sliced"] = fused[:ROWS, 5 : 5 + COLUMNS].contiguous()
    stored["turned.pairs"] = pairs = numbers(COLUMNS, 2 * ROWS)
    values["turned"] = pairs[:, 1::2].T.contiguous()
    stored["integers.all"] = numbers(ROWS + 2, COLUMNS, dtype=torch.int64) + 2**62
    values["integers"] = stored["integers.all"][1 : ROWS + 1].clone()
    stored["plain"] = values["plain"] = numbers(5)
    return stored, values


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
