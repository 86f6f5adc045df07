"""Input tensors that no output needs, as people read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..engine.graph.build import Model
from ..io.units import listed, plural, ranges
from .sections import Section

if TYPE_CHECKING:
    from ..engine.run.plan import Plan


def unused_section(plan: Plan) -> Section | None:
    """List the input tensors that no output needs; None if there are none."""
    lines = unused_lines(plan)
    return Section("Not used", lines=lines) if lines else None


def unused_lines(plan: Plan) -> list[str]:
    """Describe the input tensors that no output needs: model, names, count and reason."""
    models = {model.name: model for model in plan.built.models}
    names: dict[tuple[str, str], list[str]] = {}
    for unused in plan.built.unused:
        # the names have the layer, so layers with the same cause share a line
        names.setdefault((unused.model, unused.cause), []).extend(unused.tensors)
    lines = []
    for (model, cause), tensors in names.items():
        which = f"{_summarize(models[model], tensors)}: " if tensors else ""
        lines.append(f"{model}: {which}{cause}")
    return lines


def _summarize(model: Model, tensors: Iterable[str]) -> str:
    """Format tensor names as ``layers 4-5 (32 tensors)``, or one by one where there are few patterns."""
    patterns: dict[str, set[int]] = {}
    layers: set[int] = set()
    count = outside = 0
    for name in tensors:
        count += 1
        layer = model.layers.split(name)
        if layer is None:
            outside += 1
            patterns.setdefault(name, set())
        else:
            layers.add(layer.index)
            patterns.setdefault(f"{layer.stack}.{{}}.{layer.rest}", set()).add(layer.index)
    if len(patterns) <= 3:
        return ", ".join(name.replace("{}", _braced(found), 1) if found else name for name, found in patterns.items())
    if not layers:
        return f"{listed(patterns)} ({plural(count, 'tensor')})"
    where = f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"
    others = f" and {outside:,} outside the layers" if outside else ""
    return f"{where}{others} ({plural(count, 'tensor')})"


def _braced(numbers: set[int]) -> str:
    """Format layer numbers as in a shell: ``3``, ``{0-2}``."""
    text = ranges(numbers)
    return text if len(numbers) == 1 else f"{{{text}}}"
