"""A method that stands for one that a recipe misnames."""

from __future__ import annotations

from ...methods.kernel.contract import Absent, Base, Inputs, Kernel, Method


def _unbound(inputs: Inputs, **parameters: object) -> Kernel:
    raise AssertionError("a recipe with an unknown method is an error")


UNKNOWN_METHOD = Method(
    name="",
    summary="",
    description="",
    paper=None,
    base=Base.OPTIONAL,
    minimum=0,
    maximum=None,
    absent=Absent.PRESENT,
    parameters=(),
    bind=_unbound,
)
"""Stands for a method that the recipe misnames, so the rest of the recipe can be read."""
