"""Every byte is read once, into buffers that are reserved first; a budget that is too small names one that works."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mergeloom.engine.execute.ledger import Ledger
from mergeloom.engine.run.diff import compare as module
from mergeloom.engine.run.diff import units
from mergeloom.engine.run.diff.compare import Comparison
from mergeloom.engine.run.diff.pairs import Pair
from mergeloom.engine.run.diff.sums import WORKSPACE_BYTES
from mergeloom.engine.run.diff.units import BUFFER_BYTES, Unit, divide_memory, make_units
from mergeloom.engine.schedule.budget import Budget
from mergeloom.errors import BudgetError, CheckpointError
from mergeloom.io.reading import Reader
from mergeloom.io.task_group import TaskGroup
from mergeloom.io.tensors.dtypes import DTYPES
from mergeloom.io.tensors.refs import TensorRef
from mergeloom.methods.kernel.spec import BLOCK
from tests.support.models import FineTune, Random, tiny_llama, write_checkpoint
from tests.support.waiting import HANG_SECONDS

MIB = 1 << 20


def stored(elements: int, dtype: str = "BF16", file: str = "a", offset: int = 0) -> TensorRef:
    """A tensor that does not exist."""
    return TensorRef(Path(file), offset, DTYPES[dtype].nbytes(elements), DTYPES[dtype], (elements,))


def unit(elements: int, *dtypes: str) -> Unit:
    """The unit of one pair."""
    pair = Pair("w", "", None, stored(elements, dtypes[0]), stored(elements, dtypes[1], "b"))
    (made,) = make_units([pair])
    return made


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of 860,000 parameters, in two shards and in one; only the first has a head of its own."""
    shape = {"hidden": 128, "vocabulary": 1024}
    first, second = tiny_llama(**shape), tiny_llama(**shape, tied=True)
    base = Random(0)
    a = write_checkpoint(tmp_path / "a", first, fill=base, shard_bytes=first.parameters)
    return a, write_checkpoint(tmp_path / "b", second, fill=FineTune(base, 1), dtype="F32")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Collect the file, the first and the last byte (exclusive) of everything that comparisons read."""
    found: list[tuple[str, int, int]] = []
    lock = threading.Lock()

    def observe(file: Path, offset: int, data: memoryview) -> None:
        with lock:
            found.append((str(file), offset, offset + len(data)))

    monkeypatch.setattr(module, "Reader", partial(Reader, observe=observe))
    return found


def gaps(reads: list[tuple[str, int, int]], sizes: dict[str, tuple[int, int]]) -> list[tuple[str, int]]:
    """Return every position of the files' data at which what was read overlaps or leaves a gap."""
    wrong = []
    for file, (first, last) in sizes.items():
        position = first
        for _, start, end in sorted(read for read in reads if read[0] == file):
            wrong += [(file, position)] if start != position else []
            position = end
        wrong += [(file, position)] if position != last else []
    return wrong


def data_of(model: Path) -> dict[str, tuple[int, int]]:
    """For each shard, where the data begins and ends."""
    sizes = {}
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            sizes[str(file)] = (8 + int.from_bytes(stream.read(8), "little"), file.stat().st_size)
    return sizes


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("buffer", [1, 300_000, BUFFER_BYTES])
def test_every_byte_is_read_once(
    models: tuple[Path, Path],
    reads: list[tuple[str, int, int]],
    threads: int,
    buffer: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(units, "BUFFER_BYTES", buffer)
    comparison = Comparison(*models, threads=threads)
    found = comparison.run()
    sizes = data_of(models[0]) | data_of(models[1])
    assert gaps(reads, sizes) == []
    assert len(sizes) == 4
    total = sum(last - first for first, last in sizes.values())
    assert found.bytes_read == comparison.bytes_to_read == total == sum(end - start for _, start, end in reads)


def test_a_model_and_itself_are_read_once(models: tuple[Path, Path], reads: list[tuple[str, int, int]]) -> None:
    found = Comparison(models[0], models[0]).run()
    assert found.equal
    assert gaps(reads, data_of(models[0])) == []


def test_tensors_that_are_not_compared_are_not_read(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", {"w": torch.ones(3), "x": torch.ones(5), "y": torch.ones(2)})
    b = write_checkpoint(tmp_path / "b", {"w": torch.ones(3), "x": torch.ones(6), "z": torch.ones(2)})
    assert Comparison(a, b).run().bytes_read == 24


def test_a_file_that_changes_is_noticed(models: tuple[Path, Path]) -> None:
    comparison = Comparison(*models)
    file = models[1] / "model.safetensors"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=f"{file} was changed during the comparison"):
        comparison.run()


def test_a_file_that_is_truncated_is_an_error_of_the_input(models: tuple[Path, Path]) -> None:
    comparison = Comparison(*models, threads=3)
    os.truncate(models[1] / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match="truncated"):
        comparison.run()


def test_an_interrupt_ends_the_threads(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started, resumed = threading.Event(), threading.Event()

    class Interrupted(TaskGroup):
        def join(self) -> None:
            assert started.wait(HANG_SECONDS)
            raise KeyboardInterrupt

        def cancel(self) -> None:
            super().cancel()
            resumed.set()

    def notify(progress: object) -> None:
        started.set()
        assert resumed.wait(HANG_SECONDS)

    monkeypatch.setattr(module, "TaskGroup", Interrupted)
    monkeypatch.setattr(units, "BUFFER_BYTES", 1)
    comparison = Comparison(*models, threads=1)
    with pytest.raises(KeyboardInterrupt):
        comparison.run(notify)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("diff")]
    assert comparison._counters.bytes_read < comparison.bytes_to_read


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("threads", [1, 4])
def test_buffers_are_reserved_in_the_ledger(
    models: tuple[Path, Path], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers: list[Ledger] = []

    class Recorded(Ledger):
        def __init__(self) -> None:
            super().__init__()
            ledgers.append(self)

    monkeypatch.setattr(module, "Ledger", Recorded)
    allocated: list[int] = []
    original = module.BlockSummer.__init__

    def measured(self: Any, memory: memoryview) -> None:
        assert isinstance(memory.obj, bytearray)
        allocated.append(len(memory.obj))
        original(self, memory)

    monkeypatch.setattr(module.BlockSummer, "__init__", measured)
    found = Comparison(*models, threads=threads).run()
    (ledger,) = ledgers
    assert len(allocated) == threads
    assert max(allocated) <= ledger.peak() <= found.peak_ram
    assert ledger.held() == 0


def test_the_smallest_budget_works_and_one_byte_less_does_not() -> None:
    chosen = [unit(5 * BLOCK, "BF16", "F32"), unit(BLOCK, "F64", "F64"), unit(3, "F64", "F64")]
    sums = 5 * 4 * 8
    minimum = 50 * MIB + WORKSPACE_BYTES + 16 * BLOCK + sums
    memory = divide_memory(chosen, Budget(minimum, 50 * MIB, ()), 8)
    assert memory.threads == 1
    assert memory.buffer == 16 * BLOCK
    assert memory.peak == minimum
    smallest = r"smallest budget that works is 52\.3MiB \(50MiB for the program itself\); use --max-ram 52\.3MiB"
    with pytest.raises(BudgetError, match=smallest):
        divide_memory(chosen, Budget(minimum - 1, 50 * MIB, ()), 8)


def test_threads_and_buffers_grow_with_the_budget() -> None:
    chosen = [unit(1000 * BLOCK, "BF16", "BF16") for _ in range(20)]
    found = [divide_memory(chosen, Budget(ram * MIB, 50 * MIB, ()), 8) for ram in (52, 60, 100, 1000)]
    assert [memory.threads for memory in found] == [1, 5, 8, 8]
    assert all(memory.peak <= ram * MIB for memory, ram in zip(found, (52, 60, 100, 1000), strict=True))
    assert found[-1].buffer == BUFFER_BYTES
    assert divide_memory(chosen, Budget(1000 * MIB, 50 * MIB, ()), 2).threads == 2


def test_what_the_process_has_held_counts() -> None:
    with pytest.raises(BudgetError, match="the smallest budget that works is 90MiB"):
        divide_memory([unit(3, "F32", "F32")], Budget(80 * MIB, 50 * MIB, (), held=90 * MIB), 8)


def test_small_models_take_small_buffers() -> None:
    memory = divide_memory([unit(3, "F32", "F32")], Budget(1000 * MIB, 50 * MIB, ()), 8)
    assert (memory.threads, memory.buffer) == (1, 32)


# ------------------------------------------------------------------------------------------------ units


def test_pairs_that_share_a_tensor_are_one_unit() -> None:
    a, b, c, d = (stored(8, offset=16 * n) for n in range(4))
    pairs = [Pair(str(n), "", None, x, y) for n, (x, y) in enumerate([(a, b), (c, d), (a, a), (b, d), (c, d)])]
    (joined,) = make_units(pairs)
    assert joined.tensors == (a, b, c, d)
    assert sorted(pair.pair for pair in joined.pairs) == [0, 1, 2, 3, 4]
    apart = make_units([pairs[4], pairs[0]])
    assert [made.tensors for made in apart] == [(a, b), (c, d)]
    assert [made.pairs[0].pair for made in apart] == [1, 0]


def test_parts_of_a_chunk_do_not_overlap() -> None:
    made = unit(3 * BLOCK + 5, "BOOL", "F64")
    assert made.layout(1) == [0, BLOCK, BLOCK * 9]
    assert made.layout(4) == [0, 3 * BLOCK + 8, 3 * BLOCK + 8 + 8 * (3 * BLOCK + 5)]
    assert [made.chunk_blocks(size) for size in (1, BLOCK * 9, BLOCK * 18, BLOCK * 900)] == [1, 1, 2, 4]
