"""Runs configurations with mergekit, in mergekit's own environment: nothing of mergeloom is there.

Reads jobs from stdin as JSON, [{"name", "text", "out"}, ...], in a directory where the models' names are paths. Writes
what became of each to stdout as the last line: {name: null, or the error}, and mergekit's version.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def run(text: str, out: str) -> None:
    """One configuration, of one document or several."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from mergekit.scripts.multimerge import main as multi

    if "\n---\n" in text:
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "config.yml").write_text(text)
            arguments = [
                f"{work}/config.yml",
                "-I",
                f"{work}/stages",
                "--out-path",
                out,
                "--quiet",
                "--no-write-model-card",
            ]
            multi.main(arguments, standalone_mode=False)
        return
    configuration = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(configuration, out, MergeOptions(quiet=True, random_seed=1, clone_tensors=True, write_model_card=False))


def main() -> None:
    """All jobs, one after the other."""
    import torch

    torch.set_num_threads(1)
    results: dict[str, str | None] = {"mergekit": version("mergekit")}
    for job in json.load(sys.stdin):
        try:
            run(job["text"], job["out"])
            results[job["name"]] = None
        except Exception as error:
            results[job["name"]] = f"{type(error).__name__}: {error}"
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
