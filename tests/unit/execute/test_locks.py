"""The executor's lock order, which its docstring states: the executor's lock, then that of a lane; all others alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mergeloom.engine.execute import executor as executor_module
from mergeloom.engine.execute import lanes, node_state
from mergeloom.engine.execute.compute import fused_computer
from mergeloom.engine.execute.compute.runner import KernelRunner
from mergeloom.engine.execute.devices.base import Device
from mergeloom.engine.execute.devices.cpu import CpuDevice
from mergeloom.engine.execute.executor import Executor
from mergeloom.engine.schedule.budget import Budget, DeviceBudget
from mergeloom.engine.schedule.schedule import make_schedule
from mergeloom.io import task_group
from mergeloom.io.counters import IoCounters
from tests.support.blueprints import ELEMENTS, SLOT
from tests.support.devices import CountingDevice
from tests.support.graphs import World
from tests.support.waiting import no_hang

_LOCAL = threading.local()


def held_locks() -> list[RankedLock]:
    """The ranked locks that the current thread holds, in the order in which it took them."""
    if not hasattr(_LOCAL, "held"):
        _LOCAL.held = []
    held: list[RankedLock] = _LOCAL.held
    return held


class RankedLock:
    """A lock that may be taken only by a thread whose ranked locks all have a lower rank.

    Args:
        name: name of the lock in errors.
        rank: rank of the lock; 0 for one that is taken alone.
        nested: list that receives the names of every two locks that a thread holds at the same time.
    """

    def __init__(self, name: str, rank: int, nested: list[tuple[str, str]]) -> None:
        self.name = name
        self.rank = rank
        self._nested = nested
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock, or raise AssertionError if the thread holds another one that it must not hold."""
        held = held_locks()
        for outer in held:
            assert 0 < outer.rank < self.rank, f"lock {self.name} is taken while lock {outer.name} is held"
            self._nested.append((outer.name, self.name))
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            held.append(self)
        return taken

    def release(self) -> None:
        """Release the lock."""
        held_locks().remove(self)
        self._lock.release()

    def _is_owned(self) -> bool:  # for threading.Condition
        return self in held_locks()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()


def rank_locks(
    patch: pytest.MonkeyPatch, module: ModuleType, name: str, rank: int, nested: list[tuple[str, str]]
) -> None:
    """Make every lock that a module creates from now on a RankedLock with this name and rank."""
    names = {**vars(threading), "Lock": lambda: RankedLock(name, rank, nested)}
    patch.setattr(module, "threading", SimpleNamespace(**names))


def unlocked(function: Callable[..., Any], called: set[str]) -> Callable[..., Any]:
    """The function, which may be called only by a thread without a lock."""

    def checked(*arguments: Any) -> Any:
        assert held_locks() == []
        called.add(function.__name__)
        return function(*arguments)

    return checked


@pytest.mark.parametrize("count", [0, 1, 2])
def test_locks_are_taken_in_the_documented_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nested: list[tuple[str, str]] = []
    rank_locks(monkeypatch, executor_module, "executor", 1, nested)
    rank_locks(monkeypatch, lanes, "lane", 2, nested)
    for module in (node_state, fused_computer, task_group):
        rank_locks(monkeypatch, module, module.__name__, 0, nested)
    counters = IoCounters()
    monkeypatch.setattr(counters, "_lock", RankedLock("counters", 0, nested))
    called: set[str] = set()
    functions: dict[type, list[str]] = {World: ["read", "write", "finished"], KernelRunner: ["compare"]}
    functions[KernelRunner] += ["reduce", "combine"]
    if count:
        functions[CountingDevice] = ["upload", "uploads_begun", "download"]
    for owner, names in functions.items():
        for name in names:
            monkeypatch.setattr(owner, name, unlocked(getattr(owner, name), called))

    world = World()
    for kind in ("above", "sum", "copy", "equal") * 2:
        world.node(kind, [world.source(5 * ELEMENTS, seed=0) for _ in range(1 + (kind == "equal"))])
    budgets = tuple(DeviceBudget(f"test:{n}", 64 << 20, 2) for n in range(count)) or (DeviceBudget("cpu", None, 2),)
    schedule = make_schedule(world.graph, Budget(64 << 20, 0, budgets), slot_bytes=SLOT)
    schedule = make_schedule(world.graph, Budget(schedule.minimum_ram + 3 * SLOT, 0, budgets), slot_bytes=SLOT)
    devices: list[Device] = [CountingDevice(each.name, 64 << 20, 2) for each in budgets] if count else [CpuDevice(2)]
    executor = Executor(world.graph, schedule, devices, world, world, counters=counters)

    def notify() -> None:
        assert held_locks() == []
        called.add("notify")

    with no_hang():
        executor.run(notify)
    world.check()
    assert called == {"notify", *(name for names in functions.values() for name in names)}
    assert set(nested) == {("executor", "lane")}


def test_a_lock_that_is_taken_out_of_order_is_refused() -> None:
    nested: list[tuple[str, str]] = []
    outer, inner, alone = RankedLock("outer", 1, nested), RankedLock("inner", 2, nested), RankedLock("alone", 0, nested)
    condition = threading.Condition(outer)  # type: ignore[arg-type]
    with condition, inner:
        condition.notify_all()
        for lock, other in ((outer, outer), (inner, inner), (alone, outer)):
            with pytest.raises(AssertionError, match=f"lock {lock.name} is taken while lock {other.name} is held"):
                lock.acquire()
        assert held_locks() == [outer, inner]
    with alone, pytest.raises(AssertionError, match="lock inner is taken while lock alone is held"):
        inner.acquire()
    assert held_locks() == []
    assert nested[0] == ("outer", "inner")
