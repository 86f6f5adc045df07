"""One run of a merge into OUT: it begins, or goes on where an earlier one was stopped, and publishes what is whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .copies import Copies, digests_of_sources
from .destination import refuse_other_unfinished, shard_files
from .engine.graph import Kind
from .engine.schedule import Schedule, make_schedule
from .engine.transfer import Transfer, plan_transfers
from .engine.work import Measured, Progress, Sink
from .errors import CheckpointError, Interrupted
from .io.commit import Ended
from .io.digests import BLOCK_BYTES, tensor_digest
from .io.failures import explain
from .io.journal import Found, Journal
from .io.output import OutputDirectory, call_judge
from .io.reading import Stamps, changed, stamps_of
from .manifest import MANIFEST, facts_of, manifest_bytes, model_numbers, source_name
from .model_files import write_model_files
from .planning import Plan
from .resuming import Durable, durable_of
from .sharing import copy_threads, place
from .wording import data_size
from .writing import Shards, records_of


class Engine(Protocol):
    """What performs a schedule."""

    def __call__(
        self,
        schedule: Schedule,
        sink: Sink,
        stamps: Stamps,
        notify: Callable[[Progress], None],
        done: Mapping[int, int],
        /,
    ) -> Measured:
        """Perform it.

        Args:
            schedule: what is left to do.
            sink: where output bytes go.
            stamps: what the source files must be when they are opened.
            notify: called now and then; what it raises ends the run.
            done: for each node the bytes that need not be written, as the schedule was made with.
        """


@dataclass(frozen=True, slots=True)
class Earlier:
    """What of a plan earlier runs have done, in tensor bytes."""

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_shared: int = 0


class Run:
    """One run.

    Args:
        planned: what is made.
        out: OUT, which is held; the run lets go of it.
        engine: performs a schedule.
        fetch: downloads the input files that are missing; called once OUT is known to be usable.
        notify: called now and then with how far the whole merge is.
        say: called with what the user should know before the work begins.
        group_bytes: the most bytes of work that a kill can cost.
    """

    def __init__(
        self,
        planned: Plan,
        out: OutputDirectory,
        engine: Engine,
        fetch: Callable[[], None],
        notify: Callable[[Progress], None],
        say: Callable[[str], None],
        group_bytes: int,
    ) -> None:
        self.plan = planned
        self.out = out
        self.earlier = Earlier()
        self._engine = engine
        self._fetch = fetch
        self._notify = notify
        self._say = say
        self._group_bytes = group_bytes
        self._facts: dict[str, Any] = {}
        self._stamps: Stamps = {}
        self._found = out.found
        self._journal: Journal | None = None
        self._shards: Shards | None = None

    def perform(self, fresh: bool, digests: bool = False) -> Measured:
        """Begin or go on, and finish; what of it was measured.

        Args:
            fresh: whether to begin anew.
            digests: whether every tensor gets a digest, even where only its blocks are shared.

        Raises:
            MergeloomError: what stopped it. What is durable stays in OUT; where nothing is, nothing is left behind.
        """
        try:
            measured = self._perform(fresh, digests)
        except BaseException as error:
            kept = self._end()
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(self.how_to_go_on(kept)) from error
            if isinstance(error, OSError):
                raise explain(error, self.out.path, "the merge") from error
            raise
        self._release()
        return measured

    def _end(self) -> bool:
        """End a run that has failed; whether anything is kept."""
        ended = self._shards is None or self._shards.abandon()
        begun = self._journal is not None and self._journal.records > 0
        kept = self._found is not None or begun or not ended
        try:
            if not kept:
                self.out.abandon()
        finally:
            if self._shards is None:
                self._release()
            else:
                self._shards.commits.when_over(self._release)
        return kept

    def how_to_go_on(self, kept: bool) -> str:
        """What to tell whoever stopped the merge."""
        if not kept:
            return "stopped before anything was finished; nothing is left behind"
        return f"stopped: what is finished is kept in {self.out.path}; run the same command again to go on"

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self.out.close()

    def _perform(self, fresh: bool, digests: bool) -> Measured:
        self._facts = facts_of(self.plan)
        if not fresh and self._found is not None:
            refuse_other_unfinished(self.plan, self.out.status, self._facts)
        self._fetch()
        self.plan = place(self.plan, self.out.path, digests=digests)
        graph, layout = self.plan.built.graph, self.plan.layout
        self._stamps = stamps_of(sorted({ref.file for ref in graph.reads}))
        self._check_plan()
        found = self._found = self._look(fresh)
        self.out.begin(shard_files(self.plan), self.plan.bytes_shared, self._stamps)
        durable = durable_of(found, graph, layout, self.out.shard_path)
        self._journal = Journal(self.out.journal, self._facts | {"times": self._times()}, records_of(durable))
        measured = self._make(self._journal, durable)
        self._finish(self._journal, measured[1])
        return measured[0]

    # --- beginning ---------------------------------------------------------------------------------------------

    def _look(self, fresh: bool) -> Found | None:
        """The journal of the unfinished merge to resume; None where there is none, or it was discarded."""
        found = self.out.found
        if found is None:
            return None
        if fresh:
            self.out.start_over()
            return None
        touched = _touched(found.facts.get("times"), self._times())
        if touched:
            self._say(
                f"warning: written to or replaced since the merge began: {', '.join(touched[:3])}; size, header and "
                "samples are the same, so that it goes on"
            )
        return found

    def _times(self) -> dict[str, int]:
        """When each source file was changed last, in nanoseconds."""
        return {str(file): stamp[2] for file, stamp in self._stamps.items()}

    def _check_plan(self) -> None:
        """Raises CheckpointError where a source file isn't any more the one of which the header was planned with."""
        for model in self.plan.built.models:
            for file, stamp in model.checkpoint.stamps.items():
                if self._stamps.get(file, stamp) != stamp:
                    raise CheckpointError(
                        f"{file} was changed since the merge was planned: run the same command again, or plan anew"
                    )

    def _check_sources(self) -> None:
        """Raises CheckpointError where a source file was replaced or written to since the run began."""
        now = stamps_of(self._stamps)
        for file, stamp in self._stamps.items():
            if now[file] != stamp:
                raise changed(file)

    # --- making ------------------------------------------------------------------------------------------------

    def _make(self, journal: Journal, durable: Durable) -> tuple[Measured, Mapping[int, list[bytes]]]:
        """Compute, copy and write what is not there yet; the digests of all blocks that came through the process."""
        schedule, transfers, done = self._left(durable)
        broken: list[BaseException] = []
        begun = time.perf_counter()
        if not self.plan.computes:  # else torch imports the same
            call_judge()
        shards = self._shards = Shards(
            self.plan, self.out, journal, durable, self._check_sources, broken.append, self._group_bytes
        )
        threads = copy_threads(self.plan)
        copies = Copies(transfers, self.out, shards.commits, threads, broken.append)

        def watch(progress: Progress) -> None:
            if broken:
                raise broken[0]
            read = progress.bytes_read + copies.moved.written + self.earlier.bytes_read
            written = progress.bytes_written + copies.moved.written + self.earlier.bytes_written
            self._notify(replace(progress, bytes_read=read, bytes_written=written))

        try:
            measured = self._engine(schedule, shards, self._stamps, watch, done)
            copies.wait(lambda: watch(Progress(measured.bytes_read, measured.bytes_written)))
            watch(Progress(measured.bytes_read, measured.bytes_written))
            digests = dict(shards.digests)
            if not broken:
                shards.commits.close()
                digests |= self._digest(digests.keys(), measured, watch)
        except Ended:
            if not broken:
                raise
        except BaseException:
            shards.stop()
            raise
        finally:
            if broken:
                shards.stop()
            copies.stop()
        if broken:
            raise broken[0]
        if (lane := copies.time()) is not None:
            measured.lanes["copy"] = lane
        measured.bytes_shared += copies.moved.shared
        measured.bytes_read += copies.moved.written
        measured.bytes_written += copies.moved.written
        measured.refused = dict(copies.moved.refused)
        measured.seconds = time.perf_counter() - begun
        return measured, digests

    def _digest(
        self, known: Collection[int], measured: Measured, watch: Callable[[Progress], None]
    ) -> dict[int, list[bytes]]:
        """Where the user wants them, the digests of what never came through the process."""
        if not self.plan.digests:
            return {}
        graph = self.plan.built.graph
        kinds = {node for node in graph if graph.operation(node).kind is Kind.COPY and graph.nbytes(node)}

        def count(nbytes: int) -> None:
            measured.bytes_read += nbytes

        return digests_of_sources(
            graph,
            kinds - set(known),
            copy_threads(self.plan),
            self._stamps,
            count,
            lambda: watch(Progress(measured.bytes_read, measured.bytes_written)),
        )

    def _left(self, durable: Durable) -> tuple[Schedule, list[Transfer], dict[int, int]]:
        """What is left to do: the schedule, the transfers, and for each node the bytes that need not be written."""
        plan, graph = self.plan, self.plan.built.graph
        moving = set(plan.moved)
        done = durable.done(graph, plan.layout)
        finished = {node for node, nbytes in done.items() if nbytes >= graph.nbytes(node)}
        moving -= finished
        for node in moving | finished:
            durable.begun.pop(node, None)  # it takes, or has taken, the other way
        kept = done | {node: graph.nbytes(node) for node in moving}
        if self._found is None:
            return plan.schedule, list(plan.transfers), kept
        sharing = {transfer.file for transfer in plan.transfers if transfer.shares}
        transfers = durable.uncopied(plan_transfers(graph, plan.layout, moving, sharing))
        schedule = make_schedule(graph, plan.schedule.budget, done=kept)
        left = replace(plan, schedule=schedule, transfers=tuple(transfers))
        self.earlier = Earlier(
            plan.schedule.bytes_read + plan.bytes_copied - schedule.bytes_read - left.bytes_copied,
            plan.schedule.bytes_written + plan.bytes_copied - schedule.bytes_written - left.bytes_copied,
            plan.bytes_shared - left.bytes_shared,
        )
        self._say_what_is_there(durable, schedule.bytes_written + sum(transfer.nbytes for transfer in transfers))
        return schedule, transfers, kept

    def _say_what_is_there(self, durable: Durable, left: int) -> None:
        graph = self.plan.built.graph
        total = sum(graph.nbytes(output.node) for output in graph.outputs)
        checked = f", and the last {data_size(durable.checked)} of it were read again" if durable.checked else ""
        self._say(
            f"going on with an unfinished merge: {data_size(total - left)} of {data_size(total)} are there"
            f"{checked}; {data_size(left)} are left"
        )
        if durable.damaged:
            self._say(
                f"warning: {durable.damaged} blocks weren't what the journal says, so that all were read: the disk has "
                "lost data that it had said was durable; what was lost is made again"
            )

    # --- finishing ---------------------------------------------------------------------------------------------

    def _finish(self, journal: Journal, digests: Mapping[int, list[bytes]]) -> None:
        """Write the small files, and give everything its final name."""
        self._check_sources()
        last = write_model_files(self.plan, self.out)
        sharing = {transfer.file for transfer in self.plan.transfers if transfer.shares}
        numbers = model_numbers(self.plan)
        tensors = {
            output.label: self._digest_or_origin(output.node, digests, sharing, numbers)
            for output in self.plan.built.graph.outputs
        }
        self.out.write_file(MANIFEST, manifest_bytes(self.plan, self._facts, tensors, self.out.small_files()))
        last.append(MANIFEST)
        self.out.publish(last, lambda names: journal.append([{"publish": list(names)}]))

    def _digest_or_origin(
        self, node: int, digests: Mapping[int, list[bytes]], sharing: Collection[Path], numbers: Sequence[int]
    ) -> str | dict[str, Any]:
        """The manifest's entry of a tensor: its digest, or the origin of bytes that the process never read.

        Args:
            node: node that makes the tensor.
            digests: block digests by node.
            sharing: source files whose blocks are shared with OUT; tensors of other files are copied by the kernel.
            numbers: number of each input model in the manifest.
        """
        graph = self.plan.built.graph
        nbytes = graph.nbytes(node)
        if node in digests or not nbytes:
            blocks = digests.get(node, [])
            if len(blocks) != -(-nbytes // BLOCK_BYTES):
                raise RuntimeError(f"node {node}: {len(blocks)} blocks of {nbytes} bytes were digested")
            return tensor_digest(blocks)
        read = graph.node_sources[node][0]
        ref = graph.reads[read]
        model = graph.read_models[read]
        origin = {"model": numbers[model], "file": source_name(self.plan, model, ref.file), "offset": ref.offset}
        return origin if ref.file in sharing else origin | {"copied": True}


def _touched(before: object, now: Mapping[str, int]) -> list[str]:
    """The source files, by path, of which the time has changed."""
    if not isinstance(before, dict):
        return []
    return [Path(file).name for file, time in now.items() if before.get(file, time) != time]
