"""Merges of every causal language model class of transformers, at tiny size."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import astuple
from pathlib import Path

from benchmarks.soak.harness import Family, ended, failures, say
from tests.support.causal.checks import Outcome, Pair, check_linear, check_stack
from tests.support.causal.models import CausalModel, causal_models

CHECKS: dict[str, Callable[[Pair], Outcome]] = {"linear": check_linear, "stack": check_stack}
SECONDS = 300
"""A class whose merges take longer is stopped: its tiny model is too large."""

NOT_BUILT = frozenset({"gemma3n", "gemma4_assistant", "gemma4_unified_assistant"})
"""Classes that transformers 5.23 does not build: one needs timm, and it rejects the default configurations of two."""


def causal(family: Family, times: int, chance: random.Random) -> None:
    """Merge two models of each class, linearly and as a stack, and load the results with transformers."""
    run(causal_models(), family.directory)


def run(kinds: Iterable[CausalModel], directory: Path) -> None:
    """Check classes one by one; print those that are not plainly right, and the totals."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    totals: dict[str, Counter[str]] = {name: Counter() for name in CHECKS}
    not_built = []
    for kind in kinds:
        with tempfile.TemporaryDirectory(dir=directory) as name:
            outcomes = outcomes_of(kind, Path(name))
        for check, outcome in outcomes.items():
            said = f"{kind.model_type}, {check}: {outcome.text}"
            if check == "build":
                not_built.append(kind.model_type)
                failures.expect(kind.model_type in NOT_BUILT, said)
                continue
            totals[check][outcome.result] += 1
            failures.expect(outcome.result != "WRONG", said)
            if outcome.result in ("warned", "rejected"):
                say(f"  {outcome.result}: {said}")
    for check, counts in totals.items():
        say(f"{check}: {counts.total()} classes, " + ", ".join(f"{n} {result}" for result, n in counts.most_common()))
    say(f"not built: {len(not_built)}: {', '.join(not_built) or 'none'}")


def outcomes_of(kind: CausalModel, directory: Path) -> dict[str, Outcome]:
    """The outcomes of a class's merges by check, in a process of their own; ``build`` if there are no models."""
    answer = directory / "answer.json"
    pid = os.fork()
    if not pid:
        signal.alarm(SECONDS)
        with (directory / "log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            outcomes = _outcomes(kind, directory)
        answer.write_text(json.dumps({name: astuple(outcome) for name, outcome in outcomes.items()}))
        os._exit(0)
    code = ended(pid)
    if not answer.exists():
        return {"linear": Outcome("WRONG", f"the process ended with {code}")}
    return {name: Outcome(*values) for name, values in json.loads(answer.read_text()).items()}


def _outcomes(kind: CausalModel, directory: Path) -> dict[str, Outcome]:
    try:
        pair = Pair(kind, directory)
    except Exception as error:  # noqa: BLE001  whatever transformers raises
        return {"build": Outcome("not built", f"{type(error).__name__}: {error}")}
    outcomes = {}
    for name, check in CHECKS.items():
        try:
            outcomes[name] = check(pair)
        except Exception as error:  # noqa: BLE001  it is the outcome
            outcomes[name] = Outcome("WRONG", f"{type(error).__name__}: {error}")
    return outcomes
