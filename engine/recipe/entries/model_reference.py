"""References to models: a directory, a Hub id or a stage, with or without adapters."""

from __future__ import annotations

from dataclasses import dataclass

from ..local import is_local

_VERBATIM = "for a directory with {} in its name, write `{{path: ...}}`"


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
    """A model as a recipe names it: a directory, a Hub id, or the name of another stage, and adapters that change it.

    Args:
        path: the directory, Hub id or stage name.
        revision: a branch, tag or commit of the Hub repository, or None.
        adapters: the adapters, whose changes are added up; each is a directory, a file or a Hub id.
    """

    path: str
    revision: str | None = None
    adapters: tuple[ModelReference, ...] = ()

    @property
    def text(self) -> str:
        """``path`` or ``path@revision``, and ``+adapter`` for each adapter."""
        own = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return "+".join((own, *(adapter.text for adapter in self.adapters)))

    @property
    def base(self) -> ModelReference:
        """The model without its adapters."""
        return ModelReference(self.path, self.revision) if self.adapters else self

    @property
    def parts(self) -> tuple[ModelReference, ...]:
        """The model without its adapters, and each adapter: what is opened."""
        return self.base, *self.adapters

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """Parse ``path``, ``path@revision``, or one of these with ``+adapter`` or ``+adapter@revision`` once or more.

        A path that exists is used verbatim, whatever characters it has. Raises ModelNameError, which says what to write
        instead.
        """
        if ("@" in text or "+" in text) and is_local(text):
            return cls(text)
        base, *adapters = text.split("+")
        if not adapters:
            return cls._parse_one(text, text)
        if empty := [part for part in (base, *adapters) if not part.strip()]:
            what = "model before" if empty[0] is base else "adapter after"
            raise ModelNameError(
                f"{text!r} has no {what} the +: write `model+adapter` ({_VERBATIM.format('+')})",
            )
        own = cls._parse_one(base, text)
        return cls(own.path, own.revision, tuple(cls._parse_one(adapter, text) for adapter in adapters))

    @classmethod
    def _parse_one(cls, text: str, complete: str) -> ModelReference:
        """Parse ``path`` or ``path@revision``, a part of `complete`."""
        text = text.strip() if text != complete else text
        if "@" in text and is_local(text):
            return cls(text)
        path, *rest = text.split("@")
        if len(rest) > 1:
            raise ModelNameError(f"{text!r} has more than one @: write `id@revision` ({_VERBATIM.format('@')})")
        if not path.strip():
            raise ModelNameError(f"{text!r} does not name a model")
        if rest and not rest[0].strip():
            raise ModelNameError(f"{text!r} has no revision after the @")
        return cls(path, rest[0] if rest else None)
