"""The parameters that several methods share, described once."""

from __future__ import annotations

from typing import Annotated

from .kernel.ranges import Range
from .kernel.signature import Doc, PerInput

Weight = PerInput[Annotated[float, Range(), Doc("weight of this model.")]]
Density = PerInput[Annotated[float, Range(0, 1), Doc("fraction of this model's task vector that is kept.")]]
Epsilon = PerInput[
    Annotated[
        float,
        Range(0, 0.5, exclusive_maximum=True),
        Doc("half the width of the range of probabilities, whose center is the density (half the paper's epsilon)."),
    ]
]
Gamma = PerInput[
    Annotated[
        float, Range(0, 1), Doc("fraction of the elements, the largest ones, that is dropped (beta in the paper).")
    ]
]
Rescale = Annotated[bool, Doc("scale each sparse task vector back to its original L1 norm.")]
RescaleEps = Annotated[float, Range(0), Doc("smallest L1 norm, before and after dropping, that is rescaled.")]
Unbiased = Annotated[
    bool,
    Doc("with `rescale`: divide each kept element by its probability, as in the paper."),
]
NormalizeAll = Annotated[
    bool, Doc("divide by the sum of all weights, unless its absolute value is below `divisor_eps`.")
]
NormalizeAgreeing = Annotated[bool, Doc("divide each element by the sum of the weights of the models that agree.")]
DivisorEps = Annotated[float, Range(0), Doc("smallest sum of weights (absolute value) to divide by.")]
Lambda = Annotated[float, Range(), Doc("factor of the sum before it is added to the base.")]
