"""Measure the peak memory of every merge method at small budgets: --max-ram compared with the kernel's VmHWM.

    python -m benchmarks.memory [--methods linear ...] [--variants] [--budgets minimum +16MiB 1GiB] [--json FILE]

Cases of the methods' test suite become recipes over four models, and are planned and merged as a user would, in
processes of their own. Run it with the Python of each build of torch that is to be checked. The process's peak resident
memory (VmHWM) must stay within --max-ram; the output also says where `plan` measured another size of the program than
`merge`. Ends with 1 where a budget was exceeded or a merge failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import yaml

from mergeloom.io.sizes import parse_size
from mergeloom.methods import merge_methods
from mergeloom.methods.kernel.spec import InputSpec
from tests.support.methods.cases import CASES, Case

BUDGETS = ("minimum", "+16MiB", "1GiB")
NAMES = ("a", "b", "c", "d")
SHAPES = {
    "model.embed_tokens.weight": (64_000, 1024),
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
        same_plan: whether `plan` had measured the same size of the program.
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
    def method(self) -> str:
        """The method's name."""
        return self.case.split()[0]

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
    found: dict[str, Any] = {"merge_method": case.method, "dtype": "bfloat16", "models": entries}
    if case.base is not None:
        found["base_model"] = str(models / NAMES[case.base])
    return {**found, "parameters": shared} if shared else found


def passes(case: Case) -> int:
    """How many reductions a case has."""
    return (
        merge_methods()[case.method].kernel(InputSpec(case.models, case.base, (64, 1024)), case.parameters).reductions
    )


def measure(case: Case, budgets: Sequence[str], models: Path, work: Path) -> Iterator[Row]:
    """One case at each budget."""
    command = [sys.executable, "-m", "mergeloom"]
    file, report, out = work / "recipe.yml", work / "report.json", work / "out"
    file.write_text(yaml.safe_dump(recipe(case, models)))
    arguments = [*command, "plan", str(file), str(out), "--json", "--device", "cpu"]
    planned = json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout)
    for budget in budgets:
        size = parse_size(budget.removeprefix("+")) if budget != "minimum" else 0
        size += planned["minimum_ram"] if budget == "minimum" or budget.startswith("+") else 0
        arguments = [*command, "merge", str(file), str(out), "--quiet", "--report", str(report), "--device", "cpu"]
        report.unlink(missing_ok=True)
        ended = subprocess.run([*arguments, "--max-ram", f"{size}B"], capture_output=True, text=True, check=False)
        shutil.rmtree(out, ignore_errors=True)
        found = {"peak_ram": 0, "baseline_ram": planned["baseline_ram"], "measured": {"peak_rss": 0}}
        if report.exists():
            found = json.loads(report.read_text())
        error = ended.stderr.strip()[-300:] if ended.returncode else ""
        same = found["baseline_ram"] == planned["baseline_ram"]
        yield Row(str(case), budget, size, found["peak_ram"], found["measured"]["peak_rss"], same, error)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: for each method its narrowest margin at each budget."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    lines = [
        "| method | " + " | ".join(f"{budget}: VmHWM of `--max-ram`, MiB" for budget in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for method in dict.fromkeys(row.method for row in rows):
        cells = []
        for budget in budgets:
            own = [row for row in rows if (row.method, row.budget) == (method, budget)]
            worst = min(own, key=lambda row: -1 if row.error else row.max_ram - row.peak_rss)
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
    parser.add_argument("--variants", action="store_true", help="all cases of each method, not only one")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    import torch

    models = arguments.models / arguments.dtype
    write_models(models, arguments.dtype)
    rows = []
    cases = [case for case in CASES if case.method in arguments.methods]
    if not arguments.variants:  # of each method the case with the most passes
        cases = [
            max((case for case in cases if case.method == method), key=passes)
            for method in dict.fromkeys(case.method for case in cases)
        ]
    with tempfile.TemporaryDirectory(prefix="work-", dir=arguments.models) as work:
        for case in cases:
            for row in measure(case, arguments.budgets, models, Path(work)):
                rows.append(row)
                state = row.error or ("EXCEEDED" if row.broken else "ok")
                state += "" if row.same_plan else ", plan differs"
                held = f"{row.peak_rss:>13,} of {row.max_ram:>13,}"
                print(f"{row.case[:60]:60} {row.budget:8} {held}: {state}", flush=True)
    if arguments.json is not None:
        content = {"torch": torch.__version__, "cores": os.cpu_count(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\ntorch {torch.__version__}, {arguments.dtype}\n\n{table(rows)}\n")
    broken = [row for row in rows if row.broken]
    different = [row for row in rows if not row.same_plan]
    print(f"{len(rows)} merges: {len(broken)} exceeded the budget or failed; {len(different)} with another `plan`")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
