"""The merge: performs a plan, and leaves a model directory that other tools load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine.device import make_devices
from .engine.execute import NOTIFY_SECONDS
from .engine.run import run_graph
from .engine.schedule import Schedule, make_schedule
from .engine.transfer import Mover, Transfer, plan_transfers
from .engine.work import Measured, Progress, Sink
from .errors import CheckpointError, Interrupted, UsageError
from .io.commit import GROUP_BYTES
from .io.digests import BLOCK_BYTES, tensor_digest
from .io.journal import Found, Journal
from .io.output import OutputDirectory, ShardFile, index_bytes
from .io.reading import Reader
from .io.sizes import format_size
from .machine import process_memory
from .manifest import MANIFEST, differences, facts_of, manifest_bytes
from .model_files import write_model_files
from .planning import Options, Plan, RecipeLike, plan
from .sharing import copy_threads, place
from .writing import Shards, copied_nodes, known_blocks

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Result:
    """What a merge did.

    Args:
        plan: what was foretold.
        out: the model directory; None where nothing was to be written.
        measured: what was measured by the engine.
        peak_rss: the most resident memory of the process (VmHWM), in bytes.
    """

    plan: Plan
    out: Path | None
    measured: Measured
    peak_rss: int

    def to_dict(self) -> dict[str, Any]:
        """Foretold and measured side by side, as ``merge --report`` writes it."""
        measured = self.measured
        return {
            **self.plan.to_dict(),
            "measured": {
                "peak_rss": self.peak_rss,
                "peak_vram": measured.vram_peak,
                "bytes_read": measured.bytes_read,
                "bytes_written": measured.bytes_written,
                "bytes_shared": measured.bytes_shared,
                "seconds": measured.seconds,
                "lanes": {
                    name: {"threads": lane.threads, "worked": lane.worked, "waited": lane.waited}
                    for name, lane in measured.lanes.items()
                },
                "overflowed": measured.overflowed,
            },
        }


class _Nowhere:
    """The sink of a rehearsal."""

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Drop it."""

    def finished(self, node: int) -> None:
        """Nothing is left to do."""


def merge(
    recipe: RecipeLike | Plan,
    out: str | os.PathLike[str] | None,
    options: Options | None = None,
    *,
    fresh: bool = False,
    notify: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] | None = None,
    group_bytes: int = GROUP_BYTES,
) -> Result:
    """Plan a merge and perform it, or go on with one that was interrupted.

    Args:
        recipe: a path, a dict, a Recipe, or a Plan that was made before.
        out: the model directory to make; None for a rehearsal that does all of it and writes nothing.
        options: budgets, device, seed and the like; those of the plan where a Plan is given.
        fresh: discard an unfinished merge in `out`.
        notify: called now and then with how far it is.
        say: called with what the user should know before the work begins.
        group_bytes: the most bytes of work that a kill can cost.

    Raises:
        MergeloomError: whatever stops it; `out` then holds nothing that looks like a model.
    """
    planned = recipe if isinstance(recipe, Plan) else plan(recipe, options)
    if out is None:
        return Result(planned, None, _perform(planned, planned.schedule, _Nowhere(), notify), process_memory().peak)
    directory = OutputDirectory(Path(out))
    try:
        planned = place(planned, directory.work)
        return _Merge(planned, directory, notify, say or (lambda text: None), group_bytes).run(fresh)
    finally:
        directory.close()


class _Merge:
    """One run of a merge into OUT."""

    def __init__(
        self,
        planned: Plan,
        out: OutputDirectory,
        notify: Callable[[Progress], None] | None,
        say: Callable[[str], None],
        group_bytes: int,
    ) -> None:
        self.plan = planned
        self.out = out
        self.notify = notify
        self.say = say
        self.group_bytes = group_bytes
        self.facts: dict[str, Any] = {}

    def run(self, fresh: bool) -> Result:
        """Begin or go on, and finish."""
        found = self.out.found
        try:
            self.facts = facts_of(self.plan)
            stamps = source_stamps(self.plan)
            found = self._look(fresh)
            self.out.begin(
                [
                    ShardFile(shard.name, shard.header, shard.nbytes, shard.computed)
                    for shard in self.plan.layout.shards
                ],
                self.plan.bytes_shared,
            )
            journal = Journal(self.out.journal, found, self.facts)
        except BaseException:
            if found is None:
                self.out.abandon()
            raise
        try:
            measured, digests = self._make(journal, found)
            refuse_changed_sources(self.plan, stamps)
            self._finish(journal, digests)
        except BaseException as error:
            kept = journal.records > 0 or found is not None
            if not kept:
                self.out.abandon()
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(
                    f"stopped: what is finished is kept in {self.out.path}; run the same command again to go on"
                    if kept
                    else "stopped before anything was finished; nothing is left behind"
                ) from error
            raise
        finally:
            journal.close()
        return Result(self.plan, self.out.path, measured, process_memory().peak)

    def _look(self, fresh: bool) -> Found | None:
        """What an earlier run has left, if this one can go on with it.

        Raises:
            UsageError: where it was another merge.
        """
        found = self.out.found
        if found is None:
            return None
        if fresh:
            self.out.start_over()
            return None
        changed = differences(found.facts, self.facts)
        if changed:
            raise UsageError(
                f"{self.out.path} holds an unfinished merge, and this one differs from it: {'; '.join(changed)}. Run "
                "it as it was, choose another OUT, or give --fresh to discard what is there"
            )
        return found

    def _make(self, journal: Journal, found: Found | None) -> tuple[Measured, dict[int, list[bytes]]]:
        """Compute and write what is not there yet; the digests of all blocks that came through the process."""
        known, copied = known_blocks(found), copied_nodes(found)
        graph, schedule = self.plan.built.graph, self.plan.schedule
        done = {node: min(len(blocks) * BLOCK_BYTES, graph.nbytes(node)) for node, blocks in known.items()}
        moving = {graph.outputs[output].node for transfer in self.plan.transfers for output, _ in transfer.outputs}
        transfers: Sequence[Transfer] = self.plan.transfers
        if found is not None:
            done |= {node: graph.nbytes(node) for node in copied}
            moving -= done.keys()
            transfers = plan_transfers(graph, self.plan.layout, moving)
        durable = sum(done.get(output.node, 0) for output in graph.outputs)
        done |= {node: graph.nbytes(node) for node in moving}
        if found is not None:
            schedule = make_schedule(graph, schedule.budget, done=done)
            total = sum(graph.nbytes(output.node) for output in graph.outputs)
            self.say(
                f"going on with an unfinished merge: {format_size(durable)} of {format_size(total)} are done, "
                f"{format_size(total - durable)} are left"
            )
        broken: list[BaseException] = []
        shards = Shards(self.plan, self.out, journal, known, broken.append, self.group_bytes)
        threads = copy_threads(self.plan)
        shards.begin_copies(transfers, threads)
        mover = Mover(transfers, threads, lambda n, each: shards.copy(n, each, self.plan.shares), broken.append)
        try:
            measured = _perform(self.plan, schedule, shards, self.notify, broken, done)
            while not mover.wait(NOTIFY_SECONDS) and not broken:
                if self.notify is not None:
                    self.notify(Progress(measured.bytes_read, measured.bytes_written + shards.moved.copied))
        except BaseException:
            shards.commits.abandon()
            raise
        finally:
            mover.stop()
        if not broken:
            shards.commits.close()
        if broken:
            shards.commits.abandon()
            raise broken[0]
        moved = shards.moved
        measured.bytes_shared += moved.shared
        measured.bytes_read += moved.copied + moved.carried
        measured.bytes_written += moved.copied + moved.carried
        return measured, shards.digests

    def _finish(self, journal: Journal, digests: Mapping[int, list[bytes]]) -> None:
        """Write the small files, and give everything its final name."""
        graph, layout = self.plan.built.graph, self.plan.layout
        last = write_model_files(self.plan, self.out)
        if len(layout.shards) > 1:
            names = {output.name: layout.shards[layout.shard_of[n]].name for n, output in enumerate(graph.outputs)}
            total = sum(graph.nbytes(output.node) for output in graph.outputs)
            self.out.write_file(INDEX, index_bytes(names, total))
            last.append(INDEX)
        tensors = {output.name: self._vouch(output.node, digests) for output in graph.outputs}
        self.out.write_file(MANIFEST, manifest_bytes(self.plan, self.facts, tensors, self.out.small_files()))
        last.append(MANIFEST)
        self.out.publish(last, lambda names: journal.append([{"publish": list(names)}]))

    def _vouch(self, node: int, digests: Mapping[int, list[bytes]]) -> Any:
        """A tensor's digest; of one that never came through the process, where its bytes came from."""
        graph = self.plan.built.graph
        if node in digests or not graph.nbytes(node):
            return tensor_digest(digests.get(node, []))
        read = graph.node_sources[node][0]
        ref = graph.reads[read]
        return {"model": graph.read_models[read], "file": ref.file.name, "offset": ref.offset}


def source_stamps(planned: Plan) -> dict[Path, tuple[int, int, int]]:
    """Inode, size and time of every source file, to see at the end whether it is still the same."""
    stamps = {}
    for file in sorted({ref.file for ref in planned.built.graph.reads}):
        try:
            stat = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file}: can't be found any more ({error.strerror}): put the file back") from error
        stamps[file] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return stamps


def refuse_changed_sources(planned: Plan, before: Mapping[Path, tuple[int, int, int]]) -> None:
    """Refuse to finish where a source file was replaced or written to during the merge. Raises CheckpointError."""
    for file, stamp in source_stamps(planned).items():
        if before[file] != stamp:
            raise CheckpointError(
                f"{file} was changed while it was being merged: the output would mix two versions of it; put the file "
                "back, or start over with --fresh"
            )


def _perform(
    planned: Plan,
    schedule: Schedule,
    sink: Sink,
    notify: Callable[[Progress], None] | None,
    broken: Sequence[BaseException] = (),
    done: Mapping[int, int] | None = None,
) -> Measured:
    """Run the engine; what else breaks beside it, `broken` will hold."""

    def watch(progress: Progress) -> None:
        if broken:
            raise broken[0]
        if notify is not None:
            notify(progress)

    reader = Reader()
    try:
        return run_graph(
            planned.built.graph,
            schedule,
            make_devices,
            reader,
            sink,
            done=done,
            allow_nonfinite=planned.stage.allow_nonfinite,
            notify=watch,
        )
    finally:
        reader.close()
