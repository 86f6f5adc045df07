"""References to models: a directory, a Hub id or a stage."""

from __future__ import annotations

from dataclasses import dataclass


class ModelNameError(ValueError):
    """The name of a model is invalid.

    Args:
        problem: description of the problem.
        advice: what to do, after the problem, or empty.
    """

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(f"{problem}{advice}")
        self.problem = problem
        self.advice = advice


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A model as a recipe names it: a directory, a Hub id, or the name of another stage.

    Args:
        path: the directory, Hub id or stage name.
        revision: a branch, tag or commit of the Hub repository, or None.
    """

    path: str
    revision: str | None = None

    @property
    def text(self) -> str:
        """``path`` or ``path@revision``."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Parse ``path`` or ``path@revision``. Raises ModelNameError, which says what to write instead."""
        verbatim = "for a directory with {} in its name, write `{{path: ...}}`"
        if "+" in text:
            raise ModelNameError(
                f"{text!r} is a model with a LoRA adapter, which is not supported yet",
                f": merge the adapter into its base model and use the result ({verbatim.format('+')})",
            )
        path, *rest = text.split("@")
        if len(rest) > 1:
            raise ModelNameError(f"{text!r} has more than one @: write `id@revision` ({verbatim.format('@')})")
        if not path.strip():
            raise ModelNameError(f"{text!r} does not name a model")
        if rest and not rest[0].strip():
            raise ModelNameError(f"{text!r} has no revision after the @")
        return cls(path, rest[0] if rest else None)
