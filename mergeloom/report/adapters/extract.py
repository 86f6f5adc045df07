"""The report of `mergeloom extract-lora`: the plan in one line, the summary, and a table of all matrices."""

from __future__ import annotations

from ...engine.run.extract.decompose import is_exact
from ...engine.run.extract.extraction import Extraction
from ...engine.run.extract.result import ExtractedAdapter, MatrixResult
from ...io.units import data_size, listed, memory_size, plural
from ..sections import Grid, Section

_SHOWN = 5
"""Number of matrices in the summary: those with the largest errors."""


def extraction_headline(extraction: Extraction) -> str:
    """Return one line that says what an extraction will do."""
    exact = sum(is_exact(job.rows, job.columns) for job in extraction.matrices)
    count, full = len(extraction.matrices), extraction.tensors_in_full
    parts = [
        f"{plural(count, 'matrix', 'matrices')} to rank {extraction.options.rank} "
        f"({exact} by exact SVD, {count - exact} by randomized SVD)"
    ]
    if full:
        parts.append(f"{plural(full, 'tensor')} in full if changed")
    read, once = extraction.bytes_to_read, extraction.bytes_read_once
    again = "no re-reads" if read == once else f"{read / once:.1f} times, since matrices exceed the budget"
    parts.append(f"reads {data_size(read)} ({again})")
    parts.append(f"writes up to {data_size(extraction.max_nbytes)}")
    parts.append(f"peak RAM {memory_size(extraction.memory.peak, up=True)} of {memory_size(extraction.max_ram)}")
    return ", ".join(parts)


def extraction_sections(result: ExtractedAdapter, *, matrices: bool = False) -> list[Section]:
    """Return the sections that describe an adapter.

    Args:
        result: the adapter.
        matrices: whether to list all matrices, rather than those with the largest errors.
    """
    fields = [("adapter", f"{result.out}, {data_size(result.nbytes)}")]
    if result.error is not None and result.retained_energy is not None:
        fields += [
            ("matrices", f"{len(result.matrices):,} to rank {result.rank}"),
            ("relative error", f"{result.error:.3g}"),
            ("retained energy", _share(result.retained_energy)),
        ]
    if result.saved:
        fields.append(("saved in full", f"{plural(len(result.saved), 'tensor')}: {listed(result.saved)}"))
    if result.unchanged:
        fields.append(("unchanged", f"{plural(result.unchanged, 'tensor')}, not in the adapter"))
    if result.excluded:
        fields.append(("excluded", f"{plural(result.excluded, 'tensor')} by --include and --exclude"))
    peak = f"{memory_size(result.peak_rss, up=True)} of {memory_size(result.max_ram)}"
    fields += [("read", data_size(result.bytes_read)), ("peak RAM", peak)]
    sections = [Section("Extracted adapter", fields)]
    if result.matrices:
        worst = sorted(result.matrices, key=lambda each: -each.error)
        shown = result.matrices if matrices else worst[:_SHOWN]
        title = "Matrices" if matrices or len(shown) == len(worst) else "Matrices with the largest errors"
        sections.append(Section(title, grid=_table(shown)))
    return sections


def _table(matrices: tuple[MatrixResult, ...] | list[MatrixResult]) -> Grid:
    header = ("tensor", "shape", "rank", "SVD", "error", "retained energy")
    rows = tuple(
        (
            each.name,
            " x ".join(map(str, each.shape)),
            str(each.rank),
            each.method,
            f"{each.error:.3g}",
            _share(each.retained_energy),
        )
        for each in matrices
    )
    return Grid(header, rows, frozenset(("rank", "error", "retained energy")))


def _share(value: float) -> str:
    """Format a share in percent; only an exact 1 is shown as 100%."""
    if value == 1:
        return "100%"
    text = f"{value:.2%}"
    return ">99.99%" if text == "100.00%" else text
