"""A user's program with every public name: `make check` checks its types strictly, and tests/integration runs it.

    python -m tests.support.scripts.typed A B DIRECTORY

A and B are model directories; results go to DIRECTORY.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mergeloom


def show(progress: mergeloom.Progress) -> None:
    """Take the progress of a run."""
    assert progress.bytes_read >= 0


def merge(a: Path, b: Path, out: Path) -> mergeloom.Result:
    """Plan a mean from a dict, with every argument, and merge it."""
    recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 0.5}} for m in (a, b)]}
    plan: mergeloom.Plan = mergeloom.plan(
        recipe,
        max_ram="4GiB",
        max_vram=None,
        device="cpu",
        seed=1,
        shard_size=10**9,
        threads=1,
        strict=True,
        machine=None,
        methods=(),
        overrides={"models.0.parameters.weight": 0.25},
    )
    found: tuple[mergeloom.RecipeWarning | mergeloom.ModelWarning, ...] = plan.findings
    options: mergeloom.Options = plan.options
    checked: mergeloom.Recipe = plan.recipe
    html: str = plan._repr_html_()
    print(repr(plan), len(found), options.seed, checked.text, len(html))
    result: mergeloom.Result = mergeloom.merge(plan, out, digests="full", notify=show, say=print, warn=print)
    planned: mergeloom.Plan = result.plan
    print(result, repr(planned), result.to_dict()["measured"], result.estimate)
    return result


def look(model: os.PathLike[str], out: str) -> None:
    """Inspect, verify, compare and stack."""
    inspection: mergeloom.Inspection = mergeloom.inspect(model)
    verdict: mergeloom.Verdict = mergeloom.verify(out, sources=True, threads=2, notify=show)
    unverified: tuple[mergeloom.Unverified, ...] = verdict.unverified
    diff: mergeloom.Diff = mergeloom.diff(model, out, max_ram=1 << 30, threads=1, notify=show, say=print)
    tensors: tuple[mergeloom.TensorDiff, ...] = diff.tensors
    others: tuple[mergeloom.NotCompared, ...] = diff.not_compared
    total: mergeloom.Similarity = diff.total
    print(inspection, verdict, unverified, diff, len(tensors), others, total.cosine)
    adapter: mergeloom.ExtractedAdapter = mergeloom.extract_lora(
        model, out, f"{out}-adapter", rank=8, include=["proj"], max_ram="4GiB", notify=show, say=print
    )
    matrices: tuple[mergeloom.MatrixResult, ...] = adapter.matrices
    print(adapter.error, matrices)
    stack: mergeloom.Recipe = mergeloom.stack(
        model, window=[2, 3], step=1, repeat=2, dtype="float32", exact=True, warn=print
    )
    print(stack, mergeloom.merge(stack, None, max_ram="4GiB").measured.bytes_read)
    methods: dict[str, mergeloom.Method] = mergeloom.methods()
    parameters: tuple[mergeloom.Parameter, ...] = methods["ties"].parameters
    print(methods["ties"], parameters)


def fail() -> int:
    """Return the exit code of a mistake, by the type of its exception."""
    try:
        mergeloom.plan([{"merge_method": "linear"}])
    except (mergeloom.BudgetError, mergeloom.DiskSpaceError, mergeloom.CheckpointError) as error:
        return error.exit_code
    except (mergeloom.EnvironmentFailure, mergeloom.Interrupted, mergeloom.UsageError) as error:
        return error.exit_code
    except mergeloom.RecipeError as error:
        base: mergeloom.MergeloomError = error
        print(error.line, error.path, base.warnings)
        return base.exit_code
    return 0


def main(a: str, b: str, directory: str) -> None:
    """Call every public function."""
    out = Path(directory) / "out"
    print(mergeloom.__version__)
    merge(Path(a), Path(b), out)
    look(Path(a), str(out))
    print(fail())


if __name__ == "__main__":
    main(*sys.argv[1:])
