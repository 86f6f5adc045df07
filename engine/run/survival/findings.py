"""The warning about tensors whose change does not survive rounding, with what to write in the recipe instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ....io.units import data_size, plural
from ...model.warnings import ModelWarning, ModelWarningKind, strict_error
from .shares import TensorShare, by_group, shares_of

if TYPE_CHECKING:
    from ...execute.survival import SurvivalSums
    from ..plan import Plan

LEAST = 0.5
"""The share of a change below which a tensor is reported."""
_MOST_FILTERS = 8
_EXPERT = re.compile(r"(?<=\.)experts?\.(?=\d)")
_NUMBER = re.compile(r"\.\d+\.")


def findings(shares: Sequence[TensorShare]) -> Iterator[ModelWarning]:
    """Yield a warning for each dtype in which less than half of the change of some tensors is left.

    Args:
        shares: shares of all tensors that were compared with the base.
    """
    for stored in dict.fromkeys(each.stored for each in shares):
        compared = [each for each in shares if each.stored == stored]
        low = [each for each in compared if each.share < LEAST]
        if not low:
            continue
        least = min(low, key=lambda each: each.share)
        groups = ", ".join(f"{group} {text_of(share)}" for group, (share, _) in by_group(low).items())
        is_written, wider = "tensor is" if len(low) == 1 else "tensors are", low[0].wider
        extra = data_size(sum(each.extra_bytes for each in low))
        rules = [f"{{filter: {each}, value: {wider}}}" for each in _filters(low)]
        otherwise = "same" if stored == "FP8" else stored
        where = f"[{', '.join(rules)}, {{value: {otherwise}}}]" if len(rules) <= _MOST_FILTERS else wider
        yield ModelWarning(
            ModelWarningKind.QUANTIZATION,
            f"rounding to {stored} leaves less than half of the change from the base model in {len(low):,} of "
            f"{plural(len(compared), 'tensor')} ({groups}; least in {least.tensor}, {text_of(least.share)})",
            f"write these in {wider}, for example with out_dtype: {where}; the {is_written} then {extra} larger",
            tuple(each.tensor for each in low),
        )


def checked_shares(plan: Plan, sums: SurvivalSums, warn: Callable[[str], None]) -> tuple[TensorShare, ...]:
    """Return the shares of a merge whose output is computed, and warn about low ones.

    Raises:
        CheckpointError: in strict mode, if there is a warning.
    """
    shares = shares_of(plan.built.graph, sums)
    found = list(findings(shares))
    if found and plan.options.strict:
        raise strict_error(found)
    for finding in found:
        warn(str(finding))
    return shares


def text_of(share: float) -> str:
    """A share as a percentage."""
    return f"{share:.0%}"


def _filters(shares: Sequence[TensorShare]) -> list[str]:
    """Parts of the names that the tensors, and those like them in other layers, have in common."""
    return list(dict.fromkeys(_filter(each.tensor.rpartition("/")[2]) for each in shares))


def _filter(name: str) -> str:
    """The part of a name after the numbers of layers, without the last component; experts have one in common."""
    if expert := _EXPERT.search(name):
        before = name[: expert.start()].rstrip(".").rpartition(".")[2]
        return f"{before}.{expert.group()}"
    rest = _NUMBER.split(name)[-1]
    return rest.rpartition(".")[0] or rest
