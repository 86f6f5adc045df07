"""The buffers of threads outside the lanes fit into the memory that the plan leaves them, and the ledger knows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mergeloom.engine.execute.ledger import RAM, Ledger, Reservation
from mergeloom.engine.run.buffers import ThreadBuffers, buffers_within
from mergeloom.engine.run.bulk_copy import BulkCopier
from mergeloom.engine.run.transfers import BUFFER_BYTES
from mergeloom.errors import BudgetError
from tests.support.merges.resumable import interrupt, recipe, run, write_models
from tests.support.merges.small import make_blocks_small


@pytest.mark.parametrize(
    ("memory", "threads", "each", "fit"),
    [
        (64 * BUFFER_BYTES, 8, 2, (8, BUFFER_BYTES)),
        (7 * BUFFER_BYTES, 8, 2, (3, BUFFER_BYTES)),
        (7 * BUFFER_BYTES, 8, 1, (7, BUFFER_BYTES)),
        (BUFFER_BYTES, 8, 2, (1, BUFFER_BYTES // 2)),
        (4096, 2, 2, (1, 2048)),
    ],
)
def test_fewer_threads_then_smaller_buffers(memory: int, threads: int, each: int, fit: tuple[int, int]) -> None:
    buffers = buffers_within(Ledger(), "check buffers", memory, threads, each)
    assert (buffers.threads, buffers.nbytes) == fit
    assert buffers.threads * each * buffers.nbytes <= memory


def test_a_buffer_is_reserved_while_it_exists() -> None:
    ledger = Ledger()
    buffers = ThreadBuffers("copy buffers", 2, 100, ledger)
    with ledger.allow(150):
        with buffers.take(1000) as large, buffers.take(50) as small:
            assert (len(large), len(small), ledger.held()) == (100, 50, 150)
            with pytest.raises(BudgetError, match="cannot reserve 1 bytes of RAM for copy buffers"), buffers.take(1):
                pass
        assert ledger.held() == 0


class Recorded(Ledger):
    """A ledger that notes the names of its reservations, and what the plan allows."""

    made: list[Recorded]

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.allowed: list[int] = []
        self.made.append(self)

    @contextmanager
    def allow(self, nbytes: int, memory: str = RAM) -> Iterator[None]:
        self.allowed.append(nbytes)
        with super().allow(nbytes, memory):
            yield

    def reserve(self, name: str, nbytes: int, memory: str = RAM) -> Reservation:
        self.names.add(name)
        return super().reserve(name, nbytes, memory)


@pytest.fixture
def ledgers(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    made: list[Recorded] = []
    monkeypatch.setattr(Recorded, "made", made, raising=False)
    monkeypatch.setattr("mergeloom.engine.run.session.Ledger", Recorded)
    make_blocks_small(monkeypatch)
    return made


def test_a_merge_reserves_every_buffer_and_returns_it(ledgers: list[Recorded], tmp_path: Path) -> None:
    models, out = write_models(tmp_path), tmp_path / "out"
    stacked = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(models[0]), "layer_range": [0, 2]}]} for _ in range(2)],
    }
    interrupt(recipe(models), out, 10)
    run(recipe(models), out)
    run(stacked, tmp_path / "stack")
    started, resumed, copied = ledgers
    assert started.names >= {"arena", "workspaces"}
    assert resumed.names >= {"arena", "workspaces", "check buffers"}
    assert "copy buffers" in copied.names
    for ledger in ledgers:
        assert ledger.held() == ledger.limit() == 0
        assert 0 < ledger.peak() <= sum(ledger.allowed)


def test_a_buffer_beyond_the_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = write_models(tmp_path)
    whole = {"merge_method": "passthrough", "models": [{"model": str(models[0])}]}
    monkeypatch.setattr("mergeloom.engine.run.session.copy_buffer_bytes", lambda plan: BUFFER_BYTES - 1)
    with pytest.raises(BudgetError, match="for copy buffers"):
        run(whole, tmp_path / "out")


def test_copies_may_reserve_their_buffers_as_soon_as_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    class Observed(BulkCopier):
        def __init__(self, transfers: Any, out: Any, commits: Any, buffers: ThreadBuffers, *others: Any) -> None:
            assert buffers.ledger is not None
            limits.append((buffers.ledger.limit(), buffers.threads * buffers.nbytes))
            super().__init__(transfers, out, commits, buffers, *others)

    monkeypatch.setattr("mergeloom.engine.run.session.BulkCopier", Observed)
    models = write_models(tmp_path)
    run({"merge_method": "passthrough", "models": [{"model": str(models[0])}]}, tmp_path / "out")
    ((limit, needed),) = limits
    assert limit >= needed > 0
