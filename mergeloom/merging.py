"""The merge: performs a plan, and leaves a model directory that other tools load."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine.device import make_devices
from .engine.execute import Executor, Measured, Progress
from .errors import Interrupted
from .io.output import OutputDirectory, ShardFile, index_bytes
from .io.reading import Reader
from .machine import process_memory
from .model_files import write_model_files
from .planning import Options, Plan, RecipeLike, plan

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
                "bytes_shared": 0,
                "seconds": measured.seconds,
                "lanes": {
                    name: {"threads": lane.threads, "worked": lane.worked, "waited": lane.waited}
                    for name, lane in measured.lanes.items()
                },
                "overflowed": measured.overflowed,
            },
        }


class _Shards:
    """The executor's sink: output tensors become ranges of shards."""

    def __init__(self, plan: Plan, out: OutputDirectory) -> None:
        self._layout = plan.layout
        self._destinations = plan.built.graph.destinations()
        self._out = out

    def write(self, node: int, offset: int, data: memoryview) -> None:
        """Put a piece of a node's output in all its places."""
        for output in self._destinations[node]:
            self._out.write(self._layout.shard_of[output], self._layout.offset_of[output] + offset, data)

    def finished(self, node: int) -> None:
        """Nothing is left to do for a tensor that is written."""


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
    notify: Callable[[Progress], None] | None = None,
) -> Result:
    """Plan a merge and perform it.

    Args:
        recipe: a path, a dict, a Recipe, or a Plan that was made before.
        out: the model directory to make; None for a rehearsal that does all of it and writes nothing.
        options: budgets, device, seed and the like; those of the plan where a Plan is given.
        notify: called now and then with how far it is.

    Raises:
        MergeloomError: whatever stops it; `out` then holds nothing that looks like a model.
    """
    planned = recipe if isinstance(recipe, Plan) else plan(recipe, options)
    if out is None:
        return Result(planned, None, _perform(planned, _Nowhere(), notify), process_memory().peak)
    directory = OutputDirectory(Path(out))
    try:
        layout = planned.layout
        directory.begin(
            [ShardFile(shard.name, shard.header, shard.nbytes, shard.computed) for shard in layout.shards]
        )
        measured = _perform(planned, _Shards(planned, directory), notify)
        directory.sync()
        last = write_model_files(planned, directory)
        if len(layout.shards) > 1:
            graph = planned.built.graph
            names = {output.name: layout.shards[layout.shard_of[n]].name for n, output in enumerate(graph.outputs)}
            directory.write_file(INDEX, index_bytes(names, planned.schedule.bytes_written))
            last = [*last, INDEX]
        directory.publish(last)
    except KeyboardInterrupt as error:
        directory.abandon()
        raise Interrupted("stopped: nothing was left in OUT; run the same command again") from error
    except BaseException:
        directory.abandon()
        raise
    finally:
        directory.close()
    return Result(planned, Path(out), measured, process_memory().peak)


def _perform(planned: Plan, sink: Any, notify: Callable[[Progress], None] | None) -> Measured:
    """Run the engine."""
    reader = Reader()
    try:
        executor = Executor(
            planned.built.graph,
            planned.schedule,
            make_devices(planned.schedule.budget.devices),
            reader,
            sink,
            allow_nonfinite=planned.stage.allow_nonfinite,
        )
        return executor.run(notify)
    finally:
        reader.close()
