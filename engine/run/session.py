"""One run of a merge into OUT: it begins, or goes on where an earlier one was stopped, and publishes what is whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ...errors import CheckpointError, Interrupted
from ...io.os_errors import explain
from ...io.output.digests import BLOCK_BYTES, tensor_digest
from ...io.output.directory import OutputDirectory, preload_validator
from ...io.output.group_commit import Aborted
from ...io.output.journal import Found, Journal
from ...io.reading import Observe, Stamps, changed, stamps_of
from ...io.wording import data_size, plural
from ..execute.tasks import Measured, Progress, Sink
from ..files.write import write_model_files
from ..graph.graph import Kind
from ..schedule.schedule import Schedule, make_schedule
from .bulk_copy import BulkCopier, digests_of_sources
from .destination import refuse_other_unfinished, shard_files
from .manifest import MANIFEST, facts_of, manifest_bytes, model_numbers, source_name
from .placement import copy_threads, place
from .plan import Plan
from .recovery.checks import Checked
from .recovery.recover import RecoveredState, recover
from .recovery.source_digests import SourceDigests, check_sources, ranges_in_use, source_ranges, used_bytes
from .shard_writer import ShardWriter, records_of
from .transfers import Transfer, plan_transfers


class Engine(Protocol):
    """What performs a schedule."""

    def __call__(
        self,
        schedule: Schedule,
        sink: Sink,
        stamps: Stamps,
        notify: Callable[[Progress], None],
        done: Mapping[int, int],
        observe: Observe,
        /,
    ) -> Measured:
        """Perform it.

        Args:
            schedule: what is left to do.
            sink: where output bytes go.
            stamps: what the source files must be when they are opened.
            notify: called now and then; what it raises ends the run.
            done: for each node the bytes that need not be written, as the schedule was made with.
            observe: called with every range of a source file that is read.
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
        self._shards: ShardWriter | None = None

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
                self._shards.commits.on_closed(self._release)
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
        graph = self.plan.built.graph
        self._stamps = stamps_of(sorted({ref.file for ref in graph.reads}))
        self._check_plan()
        found = self._found = self._look(fresh)
        self.out.begin(shard_files(self.plan), self.plan.bytes_shared, self._stamps)
        durable = self._recover(found)
        if found is not None:  # its records are not needed any more, and may be large
            self._found = self.out.found = Found(found.facts, ())
        self._journal = Journal(self.out.journal, self._facts | {"stamps": self._recorded()}, records_of(durable))
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
        return found

    def _recover(self, found: Found | None) -> RecoveredState:
        """What earlier runs have left, checked: against the journal, and against source files that have changed.

        Raises:
            CheckpointError: a source file has changed, and its old version was used.
        """
        plan, graph = self.plan, self.plan.built.graph
        sharing = {transfer.file for transfer in plan.transfers if transfer.shares}
        threads = copy_threads(plan)

        def watch(checked: Checked) -> None:
            self._notify(Progress(bytes_checked=checked.nbytes, bytes_to_check=checked.total))

        durable = recover(found, graph, plan.layout, self.out.shard_path, sharing=sharing, threads=threads, watch=watch)
        if found is None:
            return durable
        used = used_bytes(graph, durable.written(graph))
        durable.sources = ranges_in_use(source_ranges(found.records, graph), used)
        changed = self._changed_since(found.facts.get("stamps"))
        if changed:
            compared = check_sources(graph, changed, durable.sources, used, threads, watch)
            durable.bytes_read += compared
            names = ", ".join(file.name for file in changed[:3]) + (", ..." if len(changed) > 3 else "")
            same = (
                f"the {data_size(compared)} that were read of it are the same" if compared else "nothing of it was used"
            )
            self._say(f"warning: written to or replaced since the merge began: {names}; {same}, so the merge resumes")
        return durable

    def _recorded(self) -> dict[str, dict[str, list[int]]]:
        """The stamp of each source file, by model and name, as the journal has it."""
        stamps: dict[str, dict[str, list[int]]] = {}
        for model, file in _source_files(self.plan):
            stamps.setdefault(str(model), {})[source_name(self.plan, model, file)] = list(self._stamps[file])
        return stamps

    def _changed_since(self, recorded: object) -> list[Path]:
        """The source files that have another stamp than the one that the journal has."""
        now, before = self._recorded(), recorded if isinstance(recorded, dict) else {}
        changed = []
        for model, file in _source_files(self.plan):
            files, name = before.get(str(model)), source_name(self.plan, model, file)
            if not isinstance(files, dict) or files.get(name) != now[str(model)][name]:
                changed.append(file)
        return list(dict.fromkeys(changed))

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

    def _make(self, journal: Journal, durable: RecoveredState) -> tuple[Measured, Mapping[int, list[bytes]]]:
        """Compute, copy and write what is not there yet; the digests of all blocks that came through the process."""
        schedule, transfers, done = self._left(durable)
        broken: list[BaseException] = []
        begun = time.perf_counter()
        if not self.plan.computes:  # else torch imports the same
            preload_validator()
        sources = SourceDigests(self.plan.built.graph, durable.sources)
        shards = self._shards = ShardWriter(
            self.plan, self.out, journal, durable, self._check_sources, broken.append, self._group_bytes, sources
        )
        threads = copy_threads(self.plan)
        copies = BulkCopier(transfers, self.out, shards.commits, threads, broken.append)

        def watch(progress: Progress) -> None:
            if broken:
                raise broken[0]
            read = progress.bytes_read + copies.moved.written + self.earlier.bytes_read
            written = progress.bytes_written + copies.moved.written + self.earlier.bytes_written
            self._notify(replace(progress, bytes_read=read, bytes_written=written))

        try:
            measured = self._engine(schedule, shards, self._stamps, watch, done, sources.add)
            copies.wait(lambda: watch(Progress(measured.bytes_read, measured.bytes_written)))
            watch(Progress(measured.bytes_read, measured.bytes_written))
            digests = dict(shards.digests)
            if not broken:
                shards.commits.close()
                digests |= self._digest(digests.keys(), measured, watch)
        except Aborted:
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
        measured.bytes_checked = durable.bytes_read
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

    def _left(self, durable: RecoveredState) -> tuple[Schedule, list[Transfer], dict[int, int]]:
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

    def _say_what_is_there(self, durable: RecoveredState, left: int) -> None:
        graph = self.plan.built.graph
        total = sum(graph.nbytes(output.node) for output in graph.outputs)
        self._say(
            f"resuming: {data_size(total - left)} of {data_size(total)} already written and checked, "
            f"{data_size(left)} left"
        )
        if durable.damaged:
            self._say(
                f"warning: {plural(durable.damaged, 'block')} of the unfinished merge differ from the journal: the "
                "disk has lost data, or the files were changed; they are made again"
            )
        if durable.differing:
            self._say(
                f"warning: {data_size(durable.differing)} of copied tensors differ from their sources: the disk has "
                "lost data, or a file was changed; they are copied again"
            )

    # --- finishing ---------------------------------------------------------------------------------------------

    def _finish(self, journal: Journal, digests: Mapping[int, list[bytes]]) -> None:
        """Write the small files, and give everything its final name."""
        self._check_sources()
        last = write_model_files(self.plan.made, self.plan.content, self.out)
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


def _source_files(plan: Plan) -> list[tuple[int, Path]]:
    """Every source file with its model's number."""
    graph = plan.built.graph
    return sorted({(graph.read_models[number], ref.file) for number, ref in enumerate(graph.reads)})
