"""The eviction rule: what the planner keeps in RAM, compared with the best choice for the same order of the nodes.

The optimum is found by trying everything: after each pass, any number of chunks of each source may stay, as long as
they fit. It knows nothing of next uses, and nothing of the planner but how many slots may hold what is kept.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeloom.engine.schedule import simulated_cache
from mergeloom.engine.schedule.simulate import Simulation
from mergeloom.engine.schedule.simulated_cache import SimulatedCache
from mergeloom.engine.schedule.step_list import CachedRange
from mergeloom.engine.schedule.tiling import ChunkedRead, chunk_elements
from tests.examples import examples
from tests.support.graphs import World

SLOT = 64
ELEMENTS = 16
"""Elements in a slot of float32: the alignment of the nodes, so a slot holds exactly one chunk."""
NEVER = 1 << 30

Names = dict[int, int]
"""The source of each read number."""


@dataclass(frozen=True)
class Problem:
    """Nodes in the order in which they run, and the slots for what stays between their passes.

    Args:
        chunks: the size of each source, in slots.
        nodes: for each node its kind and its sources.
        read_order: the sources in the order of their read numbers.
        node_order: the nodes in the order of their node numbers.
        ram_slots: all slots.
    """

    chunks: list[int]
    nodes: list[tuple[str, list[int]]]
    read_order: list[int]
    node_order: list[int]
    ram_slots: int

    @property
    def passes(self) -> list[list[int]]:
        """The sources of each pass."""
        return [sources for kind, sources in self.nodes for _ in range({"sum": 1, "above": 3}[kind])]

    @property
    def window(self) -> int:
        """Slots that the widest node takes for a chunk of each source and of its output."""
        return 1 + max(len(sources) for _, sources in self.nodes)

    @property
    def capacity(self) -> int:
        """Slots for what stays: one window is for the chunks at work, and a second for those read next."""
        return self.ram_slots - self.window * (2 if self.ram_slots >= 4 * self.window else 1)


def simulate(problem: Problem, *, short: int = 0) -> tuple[Simulation, Names]:
    """The planner's simulation of a problem, in which the last chunk of each source lacks `short` elements."""
    world = World()
    reads = {source: world.source(problem.chunks[source] * ELEMENTS - short) for source in problem.read_order}
    numbers = {}
    for node in problem.node_order:
        kind, sources = problem.nodes[node]
        numbers[node] = world.node(kind, [reads[source] for source in sources])
    devices = [0] * len(problem.nodes)
    chunks = chunk_elements(world.graph, SLOT)
    simulation = Simulation(world.graph, chunks, SLOT, problem.ram_slots, (0,), devices, problem.window)
    simulation.run([numbers[node] for node in range(len(problem.nodes))])
    return simulation, {read: source for source, read in reads.items()}


def optimum(problem: Problem) -> int:
    """The fewest chunks that must be read.

    A chunk that a pass finds in RAM keeps its slot during the pass, whether it stays afterwards or not.
    """
    passes = problem.passes
    costs = {(0,) * len(problem.chunks): 0}  # by how many chunks of each source are in RAM
    for position, sources in enumerate(passes):
        needed = set().union(*passes[position + 1 :])
        after: dict[tuple[int, ...], int] = {}
        for cached, before in costs.items():
            there = {source: cached[source] for source in sources}
            cost = before + sum(problem.chunks[source] - count for source, count in there.items())
            most = [problem.chunks[source] if source in there else count for source, count in enumerate(cached)]
            choices = [range(count + 1) if source in needed else (0,) for source, count in enumerate(most)]
            for kept in itertools.product(*choices):
                if sum(max(count, there.get(source, 0)) for source, count in enumerate(kept)) <= problem.capacity:
                    after[kept] = min(cost, after.get(kept, NEVER))
        costs = after
    return min(costs.values())


def next_use(passes: list[list[int]], source: int, position: int) -> int:
    """The first pass after `position` that needs a source."""
    return next((later for later in range(position + 1, len(passes)) if source in passes[later]), NEVER)


def furthest_first(problem: Problem) -> set[int]:
    """How many chunks Belady's rule reads, for each way to choose among sources that are needed at the same time.

    For sources of one chunk.
    """
    passes = problem.passes
    states: set[tuple[frozenset[int], int]] = {(frozenset(), 0)}
    for position, sources in enumerate(passes):
        uses = [next_use(passes, source, position) for source in range(len(problem.chunks))]
        after = set()
        for cached, cost in states:
            found = cached & set(sources)
            stays = {source for source in found if uses[source] < NEVER}
            wanted = {source for source in (cached | set(sources)) - found if uses[source] < NEVER}
            count = min(len(wanted), problem.capacity - len(found))
            soonest = sorted(uses[source] for source in wanted)[:count]
            for chosen in itertools.combinations(wanted, count):
                if sorted(uses[source] for source in chosen) == soonest:
                    after.add((frozenset(stays | set(chosen)), cost + len(set(sources) - found)))
        states = after
    return {cost for _, cost in states}


@st.composite
def one_shared_source(draw: st.DrawFn) -> Problem:
    """Nodes of which each has one source that others need too: no two sources are needed at the same time."""
    shared = draw(st.lists(st.integers(1, 3), min_size=3, max_size=4))
    chunks, nodes = list(shared), []
    for _ in range(draw(st.integers(5, 7))):
        source = draw(st.integers(0, len(shared) - 1))
        if draw(st.integers(0, 4)) == 0:
            nodes.append(("above", [source]))
        else:
            nodes.append(("sum", [source, len(chunks)]))
            chunks.append(shared[source])
    return _numbered(draw, chunks, nodes)


@st.composite
def many_shared_sources(draw: st.DrawFn) -> Problem:
    """Nodes that share one to three sources of one chunk."""
    count = draw(st.integers(2, 5))
    chosen = st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True)
    nodes = draw(st.lists(st.tuples(st.sampled_from(["sum", "sum", "above"]), chosen), min_size=3, max_size=7))
    return _numbered(draw, [1] * count, nodes)


def _numbered(draw: st.DrawFn, chunks: list[int], nodes: list[tuple[str, list[int]]]) -> Problem:
    """The problem, with numbers of the reads and nodes that say nothing about their order, and some RAM."""
    reads, numbers = draw(st.permutations(range(len(chunks)))), draw(st.permutations(range(len(nodes))))
    window = 1 + max(len(sources) for _, sources in nodes)
    return Problem(chunks, nodes, reads, numbers, window + draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 3 * window])))


def chunks_read(simulation: Simulation) -> int:
    """The chunks that a simulation reads, all of one size."""
    assert simulation.bytes_read % SLOT == 0
    return simulation.bytes_read // SLOT


def has_ties(problem: Problem) -> bool:
    """Whether two sources that could stay after the same pass are needed by the same pass next."""
    passes = problem.passes
    for position in range(len(passes)):
        uses = [next_use(passes, source, position) for source in set().union(*passes[: position + 1])]
        later = [use for use in uses if use < NEVER]
        if len(later) > len(set(later)):
            return True
    return False


@pytest.mark.parametrize("capacity", [1, 2])
def test_no_choice_reads_less(capacity: int) -> None:
    """Many graphs of seven nodes in which each source that could stay is needed at another time, numbered at random."""
    chance = random.Random(capacity)
    tried = dropped = 0
    while tried < 200:
        nodes = [("sum", chance.sample(range(5), chance.randint(1, 2))) for _ in range(7)]
        reads, numbers = (chance.sample(range(count), count) for count in (5, 7))
        problem = Problem([1] * 5, nodes, reads, numbers, 1 + max(len(sources) for _, sources in nodes) + capacity)
        if has_ties(problem):
            continue
        simulation, _ = simulate(problem)
        assert chunks_read(simulation) == optimum(problem), problem
        tried += 1
        dropped += any(step.drop for step in simulation.steps)
    assert dropped > 20


@settings(max_examples=examples(75), deadline=None, suppress_health_check=list(HealthCheck))
@given(one_shared_source())
def test_no_choice_of_parts_of_sources_reads_less(problem: Problem) -> None:
    """Sources of several sizes, of which some chunks may stay and others go."""
    simulation, _ = simulate(problem)
    assert chunks_read(simulation) == optimum(problem)


@settings(max_examples=examples(75), deadline=None, suppress_health_check=list(HealthCheck))
@given(one_shared_source())
def test_short_last_chunks_cost_no_more_than_full_ones(problem: Problem) -> None:
    """The rule counts slots: it keeps as many chunks as if the last ones were full."""
    simulation, _ = simulate(problem, short=ELEMENTS // 2)
    assert simulation.bytes_read <= optimum(problem) * SLOT
    full, _ = simulate(problem)
    assert [step.keep for step in simulation.steps] == [step.keep for step in full.steps]


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(many_shared_sources())
def test_sources_needed_at_the_same_time_are_the_only_choice(problem: Problem) -> None:
    """Sources with the same next use may go in any order; nothing is read more often than one such order does."""
    simulation, _ = simulate(problem)
    assert chunks_read(simulation) in furthest_first(problem)
    assert chunks_read(simulation) >= optimum(problem)


A, B, C = range(3)


@settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(many_shared_sources())
def test_removing_stale_entries_changes_nothing(problem: Problem) -> None:
    found = []
    for stale in (-1000, 0, 10**9):  # always, when there are more of them than live ones, never
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simulated_cache, "MAX_STALE", stale)
            found.append(simulate(problem)[0].steps)
    assert found[0] == found[1] == found[2]


def test_stale_entries_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room in RAM nothing is dropped, and each pass of each node would leave some behind."""
    monkeypatch.setattr(simulated_cache, "MAX_STALE", 10)
    cache = SimulatedCache(1)
    for position in range(1000):
        cache.put(ChunkedRead(position % 3, 16), CachedRange(0, 0, 1), 0, position)
        assert len(cache._by_use) <= 10 + 2 * len(cache._entries)
        cache.take(ChunkedRead(position % 3, 16))
    cache.put(ChunkedRead(7, 16), CachedRange(0, 0, 1), 0, 1001)
    assert cache.furthest() == (1001, ChunkedRead(7, 16))


def picture(sizes: Sequence[int], nodes: Sequence[int], capacity: int) -> Iterator[tuple[Problem, Simulation, Names]]:
    """Nodes in order, each on one of some sources and on one that no other node needs, numbered in every way."""
    chunks = [*sizes, *(sizes[source] for source in nodes)]
    pairs = [("sum", [source, len(sizes) + number]) for number, source in enumerate(nodes)]
    forward, backward = list(range(len(nodes))), list(range(len(nodes) - 1, -1, -1))
    for reads, numbers in itertools.product(itertools.permutations(range(len(sizes))), (forward, backward)):
        others = list(range(len(sizes), len(chunks)))
        problem = Problem(chunks, pairs, [*reads, *others], numbers, 3 + capacity)
        assert problem.capacity == capacity
        simulation, names = simulate(problem)
        yield problem, simulation, names


def drops(simulation: Simulation, names: Names) -> list[list[tuple[int, CachedRange]]]:
    """What each step drops: sources, with the chunks that stay."""
    return [[(names[source.read], held) for source, held in step.drop] for step in simulation.steps]


def test_furthest_use_goes_first() -> None:
    #  step   0   1   2   3   4   5     each source is one chunk, and each step needs one more chunk that no other does
    #     A   ●───────x           ○     two can stay: at step 2 A goes, since B and C are needed sooner
    #     B       ●───────●
    #     C           ●───────●         ● needed   ─ stays   x dropped   ○ read again
    for problem, simulation, names in picture([1, 1, 1], [A, B, C, B, C, A], capacity=2):
        assert drops(simulation, names) == [[], [], [(A, CachedRange())], [], [], []]
        assert chunks_read(simulation) == optimum(problem) == 4 + 6


def test_what_is_needed_later_does_not_replace_what_is_needed_sooner() -> None:
    #  step   0   1   2   3     one chunk can stay: B does not at step 1, since A is needed sooner
    #     A   ●───────●
    #     B       ●       ○
    for problem, simulation, names in picture([1, 1], [A, B, A, B], capacity=1):
        assert drops(simulation, names) == [[], [], [], []]
        assert [step.bytes_read[0] // SLOT for step in simulation.steps] == [1, 1, 0, 1]
        assert chunks_read(simulation) == optimum(problem) == 3 + 4


def test_a_source_loses_only_as_many_chunks_as_must_go() -> None:
    #  step   0   1   2   3     each source is three chunks; four can stay: at step 1, two of A go for all three of B
    #     A   ●───x───────○
    #     B       ●───●
    for problem, simulation, names in picture([3, 3], [A, B, B, A], capacity=4):
        assert drops(simulation, names) == [[], [(A, CachedRange(0, 0, 1))], [], []]
        assert [step.bytes_read[0] // SLOT for step in simulation.steps] == [3, 3, 0, 2]
        assert chunks_read(simulation) == optimum(problem) == 8 + 12


def test_more_than_one_source_goes_where_one_is_not_enough() -> None:
    #  step   0   1   2   3   4   5     A and B are one chunk, C is two; two can stay: at step 2, both go for C
    #     A   ●───────x           ○
    #     B       ●───x       ○
    #     C           ●───●
    for problem, simulation, names in picture([1, 1, 2], [A, B, C, C, B, A], capacity=2):
        assert drops(simulation, names) == [[], [], [(A, CachedRange()), (B, CachedRange())], [], [], []]
        assert chunks_read(simulation) == optimum(problem) == 6 + 8
