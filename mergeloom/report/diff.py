"""The report of `mergeloom diff`: tables by layer, by kind of tensor, and of all tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..engine.run.diff.result import Diff, Similarity, TensorDiff, TensorGroup
from ..io.units import big_number, data_size, memory_size, plural
from .sections import Grid, Section

_SHOWN = 12
_MEASURES = ("relative distance", "cosine", "equal")


def diff_sections(diff: Diff, *, tensors: bool = False) -> list[Section]:
    """Return the sections that describe a comparison.

    Args:
        diff: the comparison.
        tensors: whether to list every tensor.
    """
    sections = [Section(headline(diff), total_fields(diff)), layers_section(diff), kinds_section(diff)]
    sections = [section for section in sections if section.fields or (section.grid and section.grid.rows)]
    if tensors:
        rows = tuple((_tensor_name(each), *_dtypes(each), *measures(each.similarity)) for each in diff.tensors)
        header = ("tensor", "dtypes", *_MEASURES)
        sections.append(Section("Tensors", grid=Grid(header, rows, frozenset(_MEASURES))))
    return [*sections, *unpaired_sections(diff)]


def headline(diff: Diff) -> str:
    """Return one line that says what was compared."""
    result = "equal" if diff.equal else "different"
    return f"{diff.a} (A) and {diff.b} (B): {result}, {plural(len(diff.tensors), 'tensor')} compared"


def total_fields(diff: Diff) -> list[tuple[str, str]]:
    """Return the measures of all compared elements, and the cost."""
    total = diff.total
    peak = f"{memory_size(diff.peak_ram, up=True)} of {memory_size(diff.max_ram)}"
    return [
        ("elements", big_number(total.elements)),
        *zip(_MEASURES, measures(total), strict=True),
        ("read", data_size(diff.bytes_read)),
        ("peak RAM", peak),
    ]


def layers_section(diff: Diff) -> Section:
    """Return the table by layer; consecutive layers whose tensors are all equal share a row."""
    groups = diff.by_layer()
    if all(group.layer is None for group in groups):
        return Section("Layers")
    rows = []
    for run in _runs(groups):
        first, last = run[0], run[-1]
        name = "outside the layers" if first.layer is None else f"{first.stack}.{first.layer}"
        name += f" to {last.layer}" if len(run) > 1 else ""
        similarity = Similarity.total(group.similarity for group in run)
        rows.append((name, f"{sum(group.tensors for group in run):,}", *measures(similarity)))
    header = ("layer", "tensors", *_MEASURES)
    return Section("Layers", grid=Grid(header, tuple(rows), frozenset(header[1:])))


def _runs(groups: Sequence[TensorGroup]) -> Iterator[list[TensorGroup]]:
    """Join consecutive layers of one stack whose tensors are all equal."""
    run: list[TensorGroup] = []
    for group in groups:
        joins = run and (group.stack, group.layer) == (run[-1].stack, (run[-1].layer or 0) + 1)
        if not (joins and _all_equal(group) and _all_equal(run[-1])) and run:
            yield run
            run = []
        run.append(group)
    if run:
        yield run


def _all_equal(group: TensorGroup) -> bool:
    return group.layer is not None and group.similarity.equal == group.similarity.elements


def kinds_section(diff: Diff) -> Section:
    """Return the table by kind of tensor."""
    rows = tuple((group.kind, f"{group.tensors:,}", *measures(group.similarity)) for group in diff.by_kind())
    header = ("kind", "tensors", *_MEASURES)
    return Section("Kinds of tensors", grid=Grid(header, rows, frozenset(header[1:])))


def unpaired_sections(diff: Diff) -> Iterator[Section]:
    """Yield the lists of the tensors that were not compared."""
    for title, names in (("Only in A", diff.only_in_a), ("Only in B", diff.only_in_b)):
        if names:
            yield _list(title, names)
    if diff.not_compared:
        yield _list("Not compared", [f"{each.name}: {each.reason}" for each in diff.not_compared])


def _list(title: str, lines: Sequence[str]) -> Section:
    more = (f"and {len(lines) - _SHOWN:,} more (--json lists all)",) if len(lines) > _SHOWN else ()
    return Section(f"{title}: {plural(len(lines), 'tensor')}", lines=(*lines[:_SHOWN], *more))


def _tensor_name(tensor: TensorDiff) -> str:
    return f"{tensor.name} (tied to {tensor.tied_to} in one model)" if tensor.tied_to else tensor.name


def _dtypes(tensor: TensorDiff) -> tuple[str]:
    pairs = zip(tensor.dtypes, tensor.formats, strict=True)
    return (" ".join(dict.fromkeys(f"{dtype} ({form})" if form else dtype for dtype, form in pairs)),)


def measures(similarity: Similarity) -> tuple[str, str, str]:
    """Format relative distance, cosine and share of equal elements; a dash for what is not defined."""
    return (
        _or_dash(similarity.relative_distance, distance_text),
        _or_dash(similarity.cosine, _cosine_text),
        _or_dash(similarity.equal_share, _share_text),
    )


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def distance_text(value: float) -> str:
    """Format a relative distance with three digits: ``0.0123``, ``1.2e-07``, ``0`` only for an exact 0."""
    return f"{value:.3g}"


def _cosine_text(value: float) -> str:
    text = f"{value:.6f}"
    return f">{0.999999:.6f}" if text == "1.000000" and value < 1 else text


def _share_text(value: float) -> str:
    """Format a share in percent; only an exact 0 or 1 is shown as 0% or 100%."""
    if value in (0, 1):
        return f"{value:.0%}"
    return "<0.1%" if value < 0.001 else ">99.9%" if value > 0.999 else f"{value:.1%}"
