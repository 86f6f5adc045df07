"""mergekit's configurations: all of them are read and planned, and what they make is what mergekit 0.1.5 makes of them.

The comparison needs mergekit in an environment of its own: `make compat` makes it and runs this file, or MERGEKIT_ENV
names one. Both programs then compute with ``dtype: float32`` on models that are stored as float32. Unions of
vocabularies are compared in tests/integration/vocabularies/test_compat.py by token: mergekit orders new ones at random.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from mergeloom.engine.run.merge import merge
from mergeloom.engine.run.plan import Options
from mergeloom.engine.run.planning import plan
from mergeloom.errors import MergeloomError
from tests.support.mergekit.configurations import CONFIGURATIONS, REFUSED_HERE, REFUSED_THERE, WARNED
from tests.support.mergekit.environment import MERGEKIT, RUN
from tests.support.models.zoo import WORDS, write_zoo
from tests.support.outputs import config_of, digests, read_model
from tests.support.paths import ROOT

OPTIONS = Options(device="cpu", threads=1, max_ram=4 << 30)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models that the configurations name."""
    return write_zoo(tmp_path_factory.mktemp("zoo"))


def in_float32(text: str) -> str:
    """The configuration with ``dtype: float32`` in every document, in place of what it says."""
    documents = (re.sub(r"^(out_)?dtype: .*\n", "", part, flags=re.MULTILINE) for part in text.split("---\n"))
    return "---\n".join(f"{part}dtype: float32\n" for part in documents)


# ------------------------------------------------------------------------------------------------ reading them


def test_there_are_enough_of_them() -> None:
    assert len(CONFIGURATIONS) >= 60
    methods = {
        method for text in CONFIGURATIONS.values() for method in re.findall(r"^merge_method: (\w+)$", text, re.M)
    }
    assert methods == {file.stem for file in (ROOT / "recipes" / "methods").glob("*.yml")}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_is_read_and_planned(name: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    file = tmp_path / "config.yml"
    file.write_text(CONFIGURATIONS[name])
    planned = plan(file, OPTIONS)
    if name in WARNED:
        assert any(WARNED[name] in warning for warning in planned.warnings)
    else:
        assert planned.warnings == ()
    said = planned.to_dict()
    assert said["output"]["tensors"] > 20
    assert said["output"]["layers"] in (2, 4, 5, 6, 7, 8)


@pytest.mark.parametrize("name", REFUSED_HERE)
def test_what_is_refused_is_said(name: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    text, words = REFUSED_HERE[name]
    file = tmp_path / "config.yml"
    file.write_text(text)
    with pytest.raises(MergeloomError, match=words):
        plan(file, OPTIONS)


# ------------------------------------------------------------------------------------------------ as stages

SECOND = {
    "ties": "base_model: base\nmodels:\n  - {{model: {first}, parameters: {{weight: 0.7, density: 0.4}}}}\n"
    "  - {{model: c, parameters: {{weight: 0.5, density: 0.3}}}}\ndtype: bfloat16\n",
    "slerp": "base_model: {first}\nmodels: [{{model: c}}]\nparameters: {{t: [0.2, 0.8]}}\ndtype: float32\n",
    "passthrough": "models: [{{model: {first}, parameters: {{scale: 1.5}}}}]\ndtype: bfloat16\n",
}
FIRST = {text.split("\n")[0].split(": ")[1]: text for text in reversed(CONFIGURATIONS.values()) if text[:5] == "merge"}
"""A configuration of each method."""


@pytest.mark.parametrize(("method", "other"), list(zip(FIRST, list(SECOND) * len(FIRST), strict=False)))
def test_as_a_stage_it_is_what_it_would_be_on_disk(
    method: str, other: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo)
    first, second = in_float32(FIRST[method]), f"merge_method: {other}\n{SECOND[other]}"
    for out, text in (
        ("first", first),
        ("twice", second.format(first=tmp_path / "first")),
        ("once", f"name: first\n{first}---\n{second.format(first='first')}"),
    ):
        file = tmp_path / "config.yml"
        file.write_text(text)
        merge(file, tmp_path / out, OPTIONS)
    assert digests(tmp_path / "once", "*.safetensors") == digests(tmp_path / "twice", "*.safetensors")


# ------------------------------------------------------------------------------------------------ running them

RANDOM = re.compile("dare|della")
ROUNDING = 4e-6
"""How far results may lie apart, of the largest value of a tensor: some of float32's last bits."""
DECISIONS = {"arcee_fusion": 0.01}
"""The share of elements for which a rounding in mergekit decides otherwise."""
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}
OTHERWISE = {
    # made of fewer models: as many as the first slice has
    "models that change between slices": {"model.norm.weight", "lm_head.weight"},
    # trimmed to the vocabulary before the largest of their elements are chosen
    **dict.fromkeys(("tokenizer_source base", "tokenizer base", "chat_template auto"), EMBEDDINGS),
}
"""Tensors that mergekit makes otherwise."""
LEFT_OUT = {"the modules of an encoder and a decoder": {"shared.weight", "lm_head.weight"}}
"""Tensors that mergekit leaves out."""


@dataclass(frozen=True)
class Theirs:
    """What mergekit made of every configuration.

    Args:
        errors: by the configuration's name, None where it made something.
        outputs: where that is.
    """

    errors: dict[str, str | None]
    outputs: dict[str, Path]


def test_the_script_that_runs_mergekit_exists() -> None:
    """The comparison is skipped without mergekit, so nothing else would find a script that has moved."""
    assert RUN.is_file()


@pytest.fixture(scope="session")
def theirs(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """Run mergekit, once for all configurations."""
    python = MERGEKIT / "bin" / "python"
    if not python.exists():
        pytest.skip(f"mergekit 0.1.5 is not in {MERGEKIT.name}: `make compat` installs it, or set MERGEKIT_ENV")
    texts = {name: in_float32(text) for name, text in CONFIGURATIONS.items()}
    texts |= {name: text for name, (text, _) in REFUSED_HERE.items()} | REFUSED_THERE
    directory = tmp_path_factory.mktemp("mergekit")
    outputs = {name: directory / str(number) for number, name in enumerate(texts)}
    jobs = [{"name": name, "text": text, "out": str(outputs[name])} for name, text in texts.items()]
    command = [str(python), "-I", str(RUN)]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, cwd=zoo, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.pop("mergekit") == "0.1.5"
    return Theirs(said, outputs)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_makes_what_mergekit_makes(
    name: str, theirs: Theirs, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert theirs.errors[name] is None
    monkeypatch.chdir(zoo)
    file = tmp_path / "config.yml"
    file.write_text(in_float32(CONFIGURATIONS[name]))
    merge(file, tmp_path / "out", OPTIONS)
    ours, other = read_model(tmp_path / "out"), read_model(theirs.outputs[name])
    assert ours.keys() - LEFT_OUT.get(name, set()) == other.keys()
    layers = ("num_hidden_layers", "num_layers", "num_decoder_layers")
    configs = [config_of(out) for out in (tmp_path / "out", theirs.outputs[name])]
    assert [configs[0].get(key) for key in layers] == [configs[1].get(key) for key in layers]
    if RANDOM.search(name):
        check_draws(ours, other, name)
        return
    apart = elements = 0
    for tensor, found in other.items():
        mine = ours[tensor]
        if "tokenizer" in CONFIGURATIONS[name] and mine.shape != found.shape:  # mergekit trims to the vocabulary
            assert (len(mine), len(found)) == (64, WORDS)
            mine = mine[:WORDS]
        assert (mine.shape, mine.dtype) == (found.shape, torch.float32)
        off = int(((mine - found).abs() > ROUNDING * found.abs().max()).sum())
        if tensor in OTHERWISE.get(name, ()):
            assert off > 0
            continue
        apart, elements = apart + off, elements + found.numel()
    assert apart <= DECISIONS.get(name, 0) * elements


def check_draws(ours: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> None:
    """Two draws of a random method: equally long task vectors in the same direction, equally many elements kept."""
    inputs = {model: read_model(Path(model)) for model in ("base", "a", "b", "c")}
    (recipe,) = yaml.safe_load_all(CONFIGURATIONS[name])
    weights = {entry["model"]: entry["parameters"]["weight"] for entry in recipe["models"]}

    def flat(of: Callable[[str], Tensor]) -> Tensor:
        return torch.cat([of(tensor).double().flatten() for tensor in sorted(ours)])

    aim = flat(lambda t: sum(w * (inputs[m][t] - inputs["base"][t]) for m, w in weights.items()))  # type: ignore[arg-type,return-value]
    draws = [flat(lambda t, found=found: found[t] - inputs["base"][t]) for found in (ours, other)]  # type: ignore[misc]
    for measure in (
        lambda draw: draw.norm(),
        lambda draw: draw.abs().sum(),
        lambda draw: draw @ aim / (aim @ aim),
        lambda draw: (draw != 0).double().mean(),
    ):
        one, two = (float(measure(draw)) for draw in draws)
        assert one == pytest.approx(two, rel=0.03)
    assert not torch.equal(*draws)


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name.startswith("chat_template")])
def test_the_prompt_is_mergekits(
    name: str, theirs: Theirs, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it differs, mergekit's has stray blanks and line breaks between the parts, which the formats have not."""
    transformers = pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    monkeypatch.chdir(zoo)
    file = tmp_path / "config.yml"
    file.write_text(CONFIGURATIONS[name])
    merge(file, tmp_path / "out", OPTIONS)
    chat = [{"role": role, "content": role * 2} for role in ("system", "user", "assistant", "user")]
    prompts = []
    for out in (tmp_path / "out", theirs.outputs[name]):
        template = transformers.AutoTokenizer.from_pretrained(out).chat_template
        made, _ = render_jinja_template(
            [chat], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
        prompts.append(made[0])
    if name.split()[1] in ("alpaca", "exaone", "llama3"):
        assert prompts[0] != prompts[1]
        bare = [re.sub(r"\s|</?s>", "", prompt) for prompt in prompts]
        assert bare[0] == bare[1]
    else:
        assert prompts[0] == prompts[1]


@pytest.mark.parametrize("name", REFUSED_HERE)
def test_mergekit_takes_what_is_refused_here(name: str, theirs: Theirs) -> None:
    assert theirs.errors[name] is None


@pytest.mark.parametrize("name", REFUSED_THERE)
def test_what_mergekit_refuses_runs(
    name: str, theirs: Theirs, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert theirs.errors[name] is not None
    monkeypatch.chdir(zoo)
    file = tmp_path / "config.yml"
    file.write_text(REFUSED_THERE[name])
    merge(file, tmp_path / "out", OPTIONS)
    if name == "a model listed twice":  # with density and weight 1 that is the model, up to float32's rounding
        ours, model = read_model(tmp_path / "out"), read_model(zoo / "a")
        assert all(torch.allclose(ours[tensor], model[tensor], rtol=1e-6, atol=1e-8) for tensor in model)
