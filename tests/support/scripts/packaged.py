"""What `make packages` runs with each Python, in an environment that has the package and nothing else of this project.

    python packaged.py

Two tiny models are made, merged by every method's recipe that a user would begin with, and verified.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from safetensors import safe_open

import mergeloom

RECIPES = {
    "linear": "parameters: {weight: 0.5}",
    "slerp": "base_model: a\nparameters: {t: 0.5}",
    "ties": "base_model: a\nparameters: {weight: 1.0, density: 0.5}",
    "dare_ties": "base_model: a\nparameters: {weight: 1.0, density: 0.5}",
    "model_stock": "base_model: a",
}


def model(directory: Path, seed: int) -> None:
    """A small model of random numbers."""
    directory.mkdir()
    generator = numpy.random.default_rng(seed)
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for layer in range(4):
        bits = generator.standard_normal((96, 64), dtype=numpy.float32).view(numpy.uint32)
        begin, data = len(data), data + (bits >> 16).astype(numpy.uint16).tobytes()  # bfloat16
        entry = {"dtype": "BF16", "shape": [96, 64], "data_offsets": [begin, len(data)]}
        header[f"model.layers.{layer}.mlp.up_proj.weight"] = entry
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4}
    (directory / "config.json").write_text(json.dumps(config))


def run(*arguments: str) -> str:
    """Run the command as a user would; what it prints."""
    command = str(Path(sys.executable).with_name("mergeloom"))
    return subprocess.run([command, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Merge with the command, with ``python -m`` and from Python."""
    assert "site-packages" in mergeloom.__file__, f"{mergeloom.__file__} is not the installed package"
    assert importlib.util.find_spec("torch") is None, "the package depends on torch"
    assert (Path(mergeloom.__file__).parent / "py.typed").exists()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for seed, name in enumerate("abc"):
            model(here / name, seed)
        for method, rest in RECIPES.items():
            names = "ab" if method == "slerp" else "bc"
            entries = ", ".join(f"{{model: {here / name}}}" for name in names)
            text = f"merge_method: {method}\ndtype: bfloat16\nmodels: [{entries}]\n{rest}\n"
            recipe = here / f"{method}.yml"
            recipe.write_text(text.replace("base_model: a", f"base_model: {here / 'a'}"))
            run("plan", str(recipe))
            run("merge", str(recipe), str(here / method), "--quiet")
            assert "match the manifest" in run("verify", str(here / method))
            with safe_open(here / method / "model.safetensors", framework="numpy") as file:
                assert len(list(file.keys())) == 4
        again = here / "again"
        module = [sys.executable, "-m", "mergeloom", "merge", str(here / "ties.yml"), str(again), "--quiet"]
        subprocess.run(module, check=True)
        mergeloom.merge(here / "ties.yml", here / "third")
        bytes_ = {(out / "model.safetensors").read_bytes() for out in (here / "ties", again, here / "third")}
        assert len(bytes_) == 1
    print(f"Python {sys.version.split()[0]}, no torch: mergeloom {mergeloom.__version__} works")


if __name__ == "__main__":
    main()
