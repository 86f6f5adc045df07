"""One session of a merge into OUT: starts it, or resumes an interrupted one, and publishes the complete output.

A session has three phases. *Prepare* checks OUT, fetches missing inputs, recovers what earlier sessions have made
durable, and starts a new journal. *Execute* computes and copies the rest, journaling as it goes. *Publish* writes the
other files of the model and renames everything into OUT. `mergeloom.engine.run.recovery.records` has the protocol.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import Interrupted
from ...io.counters import IoCounters
from ...io.os_errors import translate_os_error
from ...io.output.directory import OutputDirectory
from ...io.output.group_commit import GROUP_BYTES, Aborted
from ...io.output.journal import Journal, JournalContent
from ...io.output.shards import preload_validator
from ...io.task_group import TaskGroup
from ...io.units import data_size, listed
from ..execute.ledger import Ledger
from ..execute.measurements import Measured, Progress
from ..execute.survival import SurvivalSums
from ..files.write import write_model_files
from ..schedule.schedule import Schedule, make_schedule
from .buffers import ThreadBuffers, buffers_within
from .bulk_copy import BulkCopier, digests_of_sources
from .destination import refuse_other_unfinished, shard_files
from .manifest import MANIFEST, facts_of, manifest_pieces, tensor_entries
from .placement import copy_buffer_bytes, copy_threads, with_reflinks
from .plan import Plan
from .recovery.checks import CHECKS
from .recovery.losses import losses
from .recovery.records import Publishing
from .recovery.recover import RecoveredState, recover
from .recovery.reopen import is_finished, reopen_outputs
from .recovery.source_digests import SourceDigests, check_sources, used_bytes
from .recovery.source_files import SourceFiles
from .run_lanes import run_lanes
from .shard_writer import ShardWriter, records_of
from .survival.findings import checked_shares
from .survival.shares import TensorShare, manifest_shares
from .transfers import Transfer, plan_transfers


@dataclass(frozen=True, slots=True)
class Earlier:
    """The part of a plan that earlier sessions have done, in tensor bytes."""

    bytes_read: int = 0
    bytes_written: int = 0
    bytes_shared: int = 0


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What `MergeSession.prepare` hands to the next phases.

    Args:
        facts: everything that determines the output's bytes, as the journal and the manifest have it.
        sources: source files with their stamps.
        journal: the new journal.
        recovered: intact data of earlier sessions.
        schedule: steps that are left.
        transfers: transfers that are left.
        done: number of bytes of each node that the lanes need not compute.
        survival: sums over outputs, with those of earlier sessions.
    """

    facts: dict[str, Any]
    sources: SourceFiles
    journal: Journal
    recovered: RecoveredState
    schedule: Schedule
    transfers: list[Transfer]
    done: dict[int, int]
    survival: SurvivalSums


class MergeSession:
    """One session of a merge.

    Args:
        plan: plan of the merge.
        out: the locked output directory; the session releases it.
        counters: counters of the merge; new ones if None.
        fetch: function that downloads missing input files; called once OUT is known to be usable.
        notify: function that is called at intervals with the progress of the complete merge.
        say: function that is called with messages for the user.
        warn: function that is called with warnings.
        group_bytes: maximum number of bytes of work that a kill can lose.

    Attributes:
        plan: plan of the merge; after `prepare`, with the transfers that OUT's file system allows.
        earlier: part of the plan that earlier sessions have done.
        shares: after `run`, what rounding keeps of the change of each tensor that was compared with the base.
    """

    def __init__(
        self,
        plan: Plan,
        out: OutputDirectory,
        *,
        counters: IoCounters | None = None,
        fetch: Callable[[], None] = lambda: None,
        notify: Callable[[Progress], None] = lambda progress: None,
        say: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = lambda text: None,
        group_bytes: int = GROUP_BYTES,
    ) -> None:
        self.plan = plan
        self.out = out
        self.earlier = Earlier()
        self.shares: tuple[TensorShare, ...] = ()
        self._counters = counters or IoCounters()
        self._fetch = fetch
        self._notify = notify
        self._say = say
        self._warn = warn
        self._group_bytes = group_bytes
        self._unfinished = out.lock.journal  # journal of the merge to resume
        self._journal: Journal | None = None
        self._writer: ShardWriter | None = None
        self.ledger = Ledger()

    def run(self, *, fresh: bool = False, digests: bool = False) -> Measured:
        """Start or resume the merge, and finish it.

        Args:
            fresh: whether to discard an unfinished merge in OUT.
            digests: whether every tensor gets a digest, including those that are reflinked.

        Raises:
            MergeloomError: the merge was stopped. Durable data stays in OUT; if there is none, nothing is left behind.
        """
        try:
            prepared = self.prepare(fresh, digests)
            with prepared.sources.blamed_for_errors():
                measured, block_digests = self.execute(prepared)
            self.shares = checked_shares(self.plan, prepared.survival, self._warn)
            self.publish(prepared, block_digests)
        except BaseException as error:
            kept = self._abandon()
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(self._interrupted(kept)) from error
            if isinstance(error, OSError):
                raise translate_os_error(error, self.out.path, "the merge") from error
            raise
        self._release()
        return measured

    def _abandon(self) -> bool:
        """End a session that has failed. Return whether OUT keeps anything of the merge."""
        ended = self._writer is None or self._writer.abandon()
        has_records = self._journal is not None and self._journal.records > 0
        kept = self._unfinished is not None or has_records or not ended
        try:
            if not kept:
                self.out.abandon()
        finally:
            if self._writer is None:
                self._release()
            else:
                self._writer.commits.on_closed(self._release)
        return kept

    def _interrupted(self, kept: bool) -> str:
        """The message for a user who has interrupted the merge."""
        if not kept:
            return "stopped before anything was finished; nothing is left behind"
        return f"stopped: finished work is kept in {self.out.path}; run the same command again to resume"

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self.out.close()

    # --- prepare -----------------------------------------------------------------------------------------------

    def prepare(self, fresh: bool, digests: bool) -> _Prepared:
        """Check OUT, recover what earlier sessions have made durable, and start a new journal.

        Args:
            fresh: as for `run`.
            digests: as for `run`.
        """
        facts = facts_of(self.plan)
        if names := self.plan.content.lengthened_names:
            text = "directories have the same name: the recipe and the model card in"
            self._say(f"{text} {self.out.path} say {listed(names)}")
        if not fresh and self._unfinished is not None:
            refuse_other_unfinished(self.plan, self.out.lock.status, facts)
        self._fetch()
        self.plan = with_reflinks(self.plan, self.out.path, digests=digests)
        sources = SourceFiles(self.plan)
        if fresh and self._unfinished is not None:
            self.out.start_over()
            self._unfinished = None
        self.out.begin(shard_files(self.plan), self.plan.bytes_shared, sources.stamps)
        recovered = self._recover(sources)
        if self._unfinished is not None:  # its records are recovered, and may be large
            self._unfinished = self.out.lock.journal = JournalContent(self._unfinished.facts, ())
        records = (record.to_json() for record in records_of(recovered))
        self._journal = Journal(self.out.lock.journal_path, facts | {"stamps": sources.to_json()}, records)
        schedule, transfers, done = self._remaining(recovered)
        survival = SurvivalSums(self.plan.built.graph, recovered.survival, journaled=True)
        return _Prepared(facts, sources, self._journal, recovered, schedule, transfers, done, survival)

    def _recover(self, sources: SourceFiles) -> RecoveredState:
        """Check the data of earlier sessions against the journal, and against source files that have changed.

        Raises:
            CheckpointError: a source file has changed, and its old version was used.
        """
        plan, graph, unfinished = self.plan, self.plan.built.graph, self._unfinished
        sharing = {transfer.file for transfer in plan.transfers if transfer.shares}
        buffers = self._buffers(CHECKS, each=2)

        def watch(checked: int, total: int) -> None:
            self._notify(Progress(bytes_checked=checked, bytes_to_check=total))

        with self.ledger.allow(self._memory):
            recovered = recover(
                unfinished,
                graph,
                plan.layout,
                self.out.shard_path,
                sharing=sharing,
                buffers=buffers,
                counters=self._counters,
                watch=watch,
            )
        changed = sources.changed_since(unfinished.facts.get("stamps")) if unfinished is not None else []
        if changed:
            used = used_bytes(graph, recovered.written(graph))
            with self.ledger.allow(self._memory):
                compared = check_sources(graph, changed, recovered.sources, used, buffers, self._counters, watch)
            names = ", ".join(file.name for file in changed[:3]) + (", ..." if len(changed) > 3 else "")
            unchanged = f"the {data_size(compared)} read from them are unchanged"
            same = unchanged if compared else "none of their data was used"
            self._warn(f"written to or replaced since the merge began: {names}; {same}, so the merge resumes")
        return recovered

    def _remaining(self, recovered: RecoveredState) -> tuple[Schedule, list[Transfer], dict[int, int]]:
        """The schedule and the transfers that are left, and the bytes of each node that the lanes need not compute."""
        plan, graph = self.plan, self.plan.built.graph
        done = recovered.done(graph, plan.layout)
        reopen_outputs(recovered, graph, done)
        finished = {node for node in done if is_finished(graph, node, done)}
        copied = set(plan.moved) - finished
        for node in copied | finished:
            recovered.partial.pop(node, None)  # the lanes do not continue it
        done |= {node: graph.nbytes(node) for node in copied}
        if self._unfinished is None:
            return plan.schedule, list(plan.transfers), done
        sharing = {transfer.file for transfer in plan.transfers if transfer.shares}
        transfers = recovered.uncopied(plan_transfers(graph, plan.layout, copied, sharing))
        schedule = make_schedule(graph, plan.schedule.budget, done=done)
        left = replace(plan, schedule=schedule, transfers=tuple(transfers))
        self.earlier = Earlier(
            plan.schedule.bytes_read + plan.bytes_copied - schedule.bytes_read - left.bytes_copied,
            plan.schedule.bytes_written + plan.bytes_copied - schedule.bytes_written - left.bytes_copied,
            plan.bytes_shared - left.bytes_shared,
        )
        self._say_recovered(recovered, schedule.bytes_written + sum(transfer.nbytes for transfer in transfers))
        return schedule, transfers, done

    def _say_recovered(self, recovered: RecoveredState, left: int) -> None:
        """Tell the user how much was recovered, and what was lost."""
        graph = self.plan.built.graph
        total = sum(graph.nbytes(output.node) for output in graph.outputs)
        self._say(
            f"resuming: {data_size(total - left)} of {data_size(total)} already written and checked, "
            f"{data_size(left)} left"
        )
        for text in losses(recovered):
            self._warn(text)

    # --- execute -----------------------------------------------------------------------------------------------

    def execute(self, prepared: _Prepared) -> tuple[Measured, Mapping[int, list[bytes]]]:
        """Compute, copy and write what is left. Return the measurements, and the block digests by node."""
        start = time.perf_counter()
        if not self.plan.computes:  # otherwise planning has imported numpy
            preload_validator()
        group = TaskGroup("merge")
        sources = SourceDigests(self.plan.built.graph, prepared.recovered.sources)
        prepared.recovered.sources.clear()  # the new journal has them
        writer = self._writer = ShardWriter(
            self.plan,
            self.out,
            prepared.journal,
            prepared.recovered,
            prepared.sources.check,
            group,
            self._group_bytes,
            sources,
            prepared.survival,
        )
        buffers = ThreadBuffers("copy buffers", copy_threads(self.plan), ledger=self.ledger)
        with self.ledger.allow(copy_buffer_bytes(self.plan)):  # before the copier's threads start, which reserve them
            copier = BulkCopier(prepared.transfers, self.out, writer.commits, buffers, group, self._counters)
            try:
                measured, digests = self._execute(prepared, group, sources, writer, copier)
            except Aborted:
                group.check()  # the cause
                raise
            finally:
                writer.stop()
                copier.stop()
        group.check()
        if (lane := copier.time()) is not None:
            measured.lanes["copy"] = lane
        measured.seconds = time.perf_counter() - start
        return measured, digests

    def _execute(
        self,
        prepared: _Prepared,
        group: TaskGroup,
        sources: SourceDigests,
        writer: ShardWriter,
        copier: BulkCopier,
    ) -> tuple[Measured, Mapping[int, list[bytes]]]:
        """Run the lanes and the bulk copies, and commit the rest."""

        def watch() -> None:
            group.check()
            counters, earlier = self._counters, self.earlier
            self._notify(
                Progress(
                    counters.bytes_read + earlier.bytes_read,
                    counters.bytes_written + earlier.bytes_written,
                    bytes_earlier=earlier.bytes_read + earlier.bytes_written,
                )
            )

        measured = run_lanes(
            self.plan,
            prepared.schedule,
            writer,
            self._counters,
            watch,
            stamps=prepared.sources.stamps,
            done=prepared.done,
            observe=sources.add,
            ledger=self.ledger,
            survival=prepared.survival,
        )
        copier.wait(watch)
        watch()
        if group.cancelled:
            raise Aborted
        writer.commits.close()
        digests = dict(writer.digests)
        if self.plan.digests:
            digests |= self._digest_sources(digests.keys(), prepared.sources, watch)
        return measured, digests

    def _digest_sources(
        self, known: Collection[int], sources: SourceFiles, watch: Callable[[], None]
    ) -> dict[int, list[bytes]]:
        """Read and digest the sources of tensors that the lanes have not written.

        Args:
            known: nodes whose digests are known.
            sources: source files.
            watch: function that is called at intervals.
        """
        graph = self.plan.built.graph
        copies = {node for node in graph if graph.operation(node).copies_tensor and graph.nbytes(node)}

        with self.ledger.allow(self.plan.schedule.buffer_ram):  # that of the copies is allowed already, and free
            buffers = self._buffers("digest buffers", each=1)
            return digests_of_sources(graph, copies - set(known), buffers, sources.stamps, self._counters, watch)

    @property
    def _memory(self) -> int:
        """Bytes of the plan that are free for other buffers while the lanes do not run."""
        return self.plan.schedule.buffer_ram + copy_buffer_bytes(self.plan)

    def _buffers(self, name: str, each: int) -> ThreadBuffers:
        return buffers_within(self.ledger, name, self._memory, copy_threads(self.plan), each)

    # --- publish -----------------------------------------------------------------------------------------------

    def publish(self, prepared: _Prepared, digests: Mapping[int, list[bytes]]) -> None:
        """Write the other files of the model and the manifest, and give all files their final names."""
        prepared.sources.check()
        last = write_model_files(self.plan.made, self.plan.content, self.out)
        facts = prepared.facts | manifest_shares(self.shares)
        tensors = tensor_entries(self.plan, digests)
        self.out.write_file(MANIFEST, manifest_pieces(self.plan, facts, tensors, self.out.small_files()))
        last.append(MANIFEST)
        self.out.publish(last, lambda names: prepared.journal.append([Publishing(tuple(names)).to_json()]))
