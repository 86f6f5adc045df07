"""The source files of a merge and their stamps: a file that changes while it is used would mix two versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ....errors import CheckpointError
from ....io.reading import FileStamps, source_changed, stat_fingerprints
from ..manifest import source_name, used_files

if TYPE_CHECKING:
    from ..plan import Plan


class SourceFiles:
    """The source files of a plan. Creating it takes their stamps.

    Args:
        plan: plan of the merge.

    Attributes:
        stamps: stamp of each file when the run started.

    Raises:
        CheckpointError: a file is missing, or its header has changed since it was planned with.
    """

    def __init__(self, plan: Plan) -> None:
        graph = plan.built.graph
        self._plan = plan
        self._files = used_files(graph)
        self.stamps: FileStamps = stat_fingerprints(sorted({file for _, file in self._files}))
        for model in plan.built.models:
            for file, stamp in model.checkpoint.stamps.items():
                if self.stamps.get(file, stamp) != stamp:
                    raise CheckpointError(
                        f"{file} was changed since the merge was planned: run the same command again, or plan anew"
                    )

    def check(self) -> None:
        """Raise CheckpointError if a file was replaced or written to since the run started."""
        now = stat_fingerprints(self.stamps)
        for file, stamp in self.stamps.items():
            if now[file] != stamp:
                raise source_changed(file)

    @contextmanager
    def blamed_for_errors(self) -> Iterator[None]:
        """Report a changed file instead of an error about the data of a model that the block raises.

        A file that is overwritten while it is read can hold anything for a moment, such as NaNs. The files are looked
        at only after an error.

        Raises:
            CheckpointError: a file was replaced or written to since the run started.
        """
        try:
            yield
        except CheckpointError:
            self.check()
            raise

    def to_json(self) -> dict[str, dict[str, list[int]]]:
        """Return the stamps by model number and file name, as the journal stores them."""
        stamps: dict[str, dict[str, list[int]]] = {}
        for model, file in self._files:
            stamps.setdefault(str(model), {})[source_name(self._plan, model, file)] = list(self.stamps[file])
        return stamps

    def changed_since(self, recorded: object) -> list[Path]:
        """Return the files whose stamps differ from those in the journal.

        Args:
            recorded: stamps as the journal has them, which may be malformed.
        """
        now, before = self.to_json(), recorded if isinstance(recorded, dict) else {}
        files = []
        for model, file in self._files:
            stamps, name = before.get(str(model)), source_name(self._plan, model, file)
            if not isinstance(stamps, dict) or stamps.get(name) != now[str(model)][name]:
                files.append(file)
        return list(dict.fromkeys(files))
