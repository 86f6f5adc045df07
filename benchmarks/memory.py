"""Measure the peak memory of every merge method at small budgets: --max-ram against the kernel's VmHWM.

    python -m benchmarks.memory [--models DIRECTORY] [--methods linear ...] [--budgets minimum +16MiB 1GiB] [--json FILE]

Each case of the methods' test suite becomes a recipe over four small models, and is planned and merged as a user would,
in processes of their own. Run it with the Python of each build of torch that is to be checked. The process's peak
resident memory (VmHWM) must stay within --max-ram, and `merge` must make the plan that `plan` printed. Ends with 1 where
one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import yaml

from mergeloom.io.sizes import parse_size
from mergeloom.methods import merge_methods
from tests.cases import CASES, Case

BUDGETS = ("minimum", "+16MiB", "1GiB")
NAMES = ("a", "b", "c", "d")
SHAPES = {
    "model.embed_tokens.weight": (16_000, 1024),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in (
            ("self_attn.q_proj.weight", (1024, 1024)),
            ("mlp.up_proj.weight", (4096, 1024)),
            ("mlp.down_proj.weight", (1024, 4096)),
            ("input_layernorm.weight", (1024,)),
        )
    },
    "model.norm.weight": (1024,),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}


@dataclass(frozen=True)
class Row:
    """One merge.

    Args:
        case: the method and its parameters.
        budget: as given on the command line.
        max_ram: the budget in bytes.
        planned: the peak that `merge` planned, in bytes.
        peak_rss: the process's VmHWM at the end, in bytes.
        same_plan: whether `plan` had printed the same figures.
        error: what `merge` said where it failed.
    """

    case: str
    budget: str
    max_ram: int
    planned: int
    peak_rss: int
    same_plan: bool
    error: str = ""

    @property
    def broken(self) -> bool:
        """Whether the budget was exceeded, or the merge failed."""
        return bool(self.error) or self.peak_rss > self.max_ram


def write_models(directory: Path, dtype: str) -> None:
    """Write four models, fine-tunes of one, unless they exist."""
    import torch
    from safetensors.torch import save_file

    generator = numpy.random.default_rng(0)
    start = {name: generator.standard_normal(shape, dtype=numpy.float32) * 0.02 for name, shape in SHAPES.items()}
    for name in NAMES:
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "model.safetensors").exists():
            continue
        tensors = {}
        for key, values in start.items():
            step = generator.standard_normal(values.shape, dtype=numpy.float32) * (0.0007 if name != "a" else 0.0)
            tensors[key] = torch.from_numpy(values + step).to(getattr(torch, dtype))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIG))


def recipe(case: Case, models: Path) -> dict[str, Any]:
    """The recipe of a case."""
    per_input = {p.name for p in merge_methods()[case.method].parameters if p.per_input}
    entries: list[dict[str, Any]] = []
    for place in range(case.models):
        if place != case.base:
            own = {key: value[place] for key, value in case.parameters.items() if key in per_input}
            entries.append({"model": str(models / NAMES[place]), **({"parameters": own} if own else {})})
    shared = {key: value for key, value in case.parameters.items() if key not in per_input}
    found: dict[str, Any] = {"merge_method": case.method, "models": entries}
    if case.base is not None:
        found["base_model"] = str(models / NAMES[case.base])
    return {**found, "parameters": shared} if shared else found


def measure(case: Case, budget: str, models: Path, work: Path) -> Row:
    """One case at one budget."""
    command = [sys.executable, "-m", "mergeloom"]
    file, report, out = work / "recipe.yml", work / "report.json", work / "out"
    file.write_text(yaml.safe_dump(recipe(case, models)))
    shutil.rmtree(out, ignore_errors=True)

    def planned(*options: str) -> dict[str, Any]:
        arguments = [*command, "plan", str(file), str(out), "--json", "--device", "cpu", *options]
        found: dict[str, Any] = json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout)
        return found

    if budget == "minimum" or budget.startswith("+"):
        more = 0 if budget == "minimum" else parse_size(budget[1:])
        size = planned()["minimum_ram"] + more
    else:
        size = parse_size(budget)
    options = ["--max-ram", f"{size}B"]
    arguments = [*command, "merge", str(file), str(out), "--quiet", "--report", str(report), "--device", "cpu"]
    ended = subprocess.run([*arguments, *options], capture_output=True, text=True, check=False)
    shutil.rmtree(out, ignore_errors=True)
    if ended.returncode:
        return Row(str(case), budget, size, 0, 0, False, ended.stderr.strip()[-300:])
    said = json.loads(report.read_text())
    same = planned(*options)["peak_ram"] == said["peak_ram"]
    return Row(str(case), budget, size, said["peak_ram"], said["measured"]["peak_rss"], same)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: for each method its narrowest margin at each budget."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    lines = [
        "| method | " + " | ".join(f"{budget}: VmHWM of `--max-ram`, MiB" for budget in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for method in dict.fromkeys(row.case.split()[0] for row in rows):
        cells = []
        for budget in budgets:
            own = [row for row in rows if row.case.split()[0] == method and row.budget == budget]
            worst = min(own, key=lambda row: row.max_ram - row.peak_rss if not row.error else -1)
            mark = " failed" if worst.error else " EXCEEDED" if worst.broken else ""
            cells.append(f"{worst.peak_rss / 2**20:.0f} of {worst.max_ram / 2**20:.0f}{mark}")
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("/dev/shm/mergeloom-memory"), help="where models are kept")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float64"), default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=sorted(merge_methods()))
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    import torch

    models = arguments.models / arguments.dtype
    write_models(models, arguments.dtype)
    rows = []
    with tempfile.TemporaryDirectory(prefix="mergeloom-memory-", dir=arguments.models) as work:
        for case in CASES:
            if case.method in arguments.methods:
                for budget in arguments.budgets:
                    row = measure(case, budget, models, Path(work))
                    rows.append(row)
                    state = row.error or ("EXCEEDED" if row.broken else "ok") + (
                        "" if row.same_plan else ", plan differs"
                    )
                    print(
                        f"{row.case[:60]:60} {budget:8} {row.peak_rss:>13,} of {row.max_ram:>13,}: {state}", flush=True
                    )
    if arguments.json is not None:
        content = {"torch": torch.__version__, "cores": os.cpu_count(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\ntorch {torch.__version__}, {arguments.dtype}\n\n{table(rows)}\n")
    broken = [row for row in rows if row.broken]
    different = [row for row in rows if not row.error and not row.same_plan]
    print(
        f"{len(rows)} merges: {len(broken)} exceeded the budget or failed; {len(different)} planned otherwise by `plan`"
    )
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
