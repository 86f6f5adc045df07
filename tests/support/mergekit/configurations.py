"""Configurations as mergekit's documentation describes them, written to cover it: each is read by both programs.

Models are directories by the side of each other: ``base`` with the fine-tunes ``a``, ``b`` and ``c`` of 4 layers;
``deep`` of 6 layers; ``tied`` and ``tied2`` without a head; ``qwen`` and ``qwen2`` with biases; ``t5`` and ``t5b`` with
an encoder and a decoder; ``words`` with twelve more tokens; ``sees`` with a vision tower; ``new`` and ``new2`` of an
architecture that nobody knows; ``pickled`` without safetensors.
"""

from __future__ import annotations

from tests.support.mergekit.methods import METHODS, TASKS, WEIGHTED

CONFIGURATIONS: dict[str, str] = {
    **METHODS,
    # ---------------------------------------------------------------------------------------------- layers
    "passthrough": "merge_method: passthrough\nmodels: [{model: a}]\n",
    "linear, with weights in pickles": (
        "merge_method: linear\nmodels: [{model: pickled}, {model: a}]\nparameters: {weight: 0.5}\n"
    ),
    "passthrough, a stack": """\
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
  - sources: [{model: a, layer_range: [3, 4]}]
merge_method: passthrough
dtype: float16
""",
    "passthrough, of other depths": """\
slices:
  - sources: [{model: deep, layer_range: [0, 6]}]
  - sources: [{model: a, layer_range: [2, 4]}]
merge_method: passthrough
""",
    "passthrough, new layers that do nothing": """\
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources:
      - model: a
        layer_range: [2, 3]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.0}
            - value: 1.0
  - sources: [{model: a, layer_range: [3, 4]}]
merge_method: passthrough
""",
    "passthrough, a scale": "merge_method: passthrough\nmodels: [{model: a}]\nparameters: {scale: [0.5, 1.5]}\n",
    "slices of one layer": """\
slices:
  - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [3, 4]}]
  - sources: [{model: a, layer_range: [1, 4]}, {model: b, layer_range: [1, 4]}]
merge_method: slerp
base_model: a
parameters: {t: [0.1, 0.9]}
""",
    "a base of each slice": """\
slices:
  - base_model: a
    sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - base_model: b
    sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
merge_method: slerp
base_model: a
parameters: {t: 0.25}
""",
    "models that change between slices": """\
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.5, density: 0.5}}
  - sources:
      - {model: b, layer_range: [1, 3], parameters: {weight: 0.7, density: 0.6}}
      - {model: base, layer_range: [1, 3]}
      - {model: c, layer_range: [1, 3], parameters: {weight: 0.2, density: 0.4}}
merge_method: ties
base_model: base
""",
    # ---------------------------------------------------------------------------------------------- scopes
    "a slice's parameters": """\
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    parameters: {t: 0.1}
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
merge_method: slerp
base_model: a
parameters: {t: 0.9}
""",
    "a source's, a slice's and the recipe's": """\
slices:
  - sources:
      - {model: a, layer_range: [0, 4], parameters: {weight: {filter: mlp, value: 0.8}}}
      - {model: b, layer_range: [0, 4]}
    parameters: {weight: {filter: self_attn, value: [0.1, 0.5]}}
merge_method: linear
parameters: {weight: 0.3}
""",
    "the first filter that fits": """\
merge_method: linear
models:
  - model: a
    parameters:
      weight:
        - {filter: proj, value: 0.1}
        - {filter: q_proj, value: 0.9}
        - {filter: "*", value: 0.4}
  - {model: b, parameters: {weight: 1}}
""",
    "filters by layer": """\
merge_method: linear
models:
  - model: a
    parameters:
      weight:
        - {filter: layers.1., value: 0.9}
        - {filter: embed_tokens, value: 0.7}
        - {filter: lm_head, value: 0.6}
        - {filter: model.norm, value: 0.2}
        - value: 0.5
  - {model: b, parameters: {weight: 1}}
""",
    "a switch in steps": f"""\
merge_method: task_arithmetic
{TASKS.replace("density", "ignored")}
parameters:
  normalize: [true, false]
""",
    "a module's parameters": """\
merge_method: linear
modules:
  default:
    models: [{model: a}, {model: b, parameters: {weight: 0.2}}]
    parameters: {weight: 0.7}
parameters: {weight: 0.1}
""",
    "slices of a module": """\
merge_method: passthrough
modules:
  default:
    slices:
      - sources: [{model: a, layer_range: [0, 2]}]
      - sources: [{model: b, layer_range: [2, 4]}]
""",
    "anchors": """\
shared: &shared
  weight: 0.4
merge_method: linear
models:
  - {model: a, parameters: *shared}
  - {model: b, parameters: {<<: *shared, weight: 0.2}}
""",
    "references as mappings": """\
merge_method: linear
models:
  - model: {model: {path: a}}
    parameters: {weight: 0.5}
  - model: {model: {path: b, revision: null}}
    parameters: {weight: 0.2}
""",
    "keys without effect": """\
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
    residual_weight: 0.5
merge_method: slerp
base_model: a
parameters: {t: 0.5, int8_mask: true}
some_note: of the author's
""",
    # ---------------------------------------------------------------------------------------------- other models
    "tied heads": """\
merge_method: linear
models:
  - {model: tied, parameters: {weight: 0.5}}
  - {model: tied2, parameters: {weight: 0.2}}
""",
    "biases": """\
merge_method: slerp
base_model: qwen
models: [{model: qwen2}]
parameters: {t: [{filter: bias, value: 0.2}, {value: 0.6}]}
""",
    "an encoder and a decoder": """\
merge_method: linear
models:
  - {model: t5, parameters: {weight: 0.5}}
  - {model: t5b, parameters: {weight: [0.2, 0.8]}}
""",
    "the modules of an encoder and a decoder": """\
merge_method: linear
modules:
  encoder:
    models:
      - {model: t5, parameters: {weight: 0.5}}
      - {model: t5b, parameters: {weight: 0.2}}
  decoder:
    slices:
      - sources:
          - {model: t5, layer_range: [0, 1], parameters: {weight: 1.0}}
          - {model: t5b, layer_range: [0, 1], parameters: {weight: 3.0}}
      - sources:
          - {model: t5, layer_range: [1, 2], parameters: {weight: 1.0}}
          - {model: t5b, layer_range: [1, 2], parameters: {weight: 0.0}}
""",
    "all modules of an encoder and a decoder": """\
merge_method: passthrough
modules:
  encoder: {models: [{model: t5}]}
  decoder: {models: [{model: t5b}]}
  shared: {models: [{model: t5b}]}
""",
    # ---------------------------------------------------------------------------------------------- other files
    "tokenizer_source base": f"merge_method: ties\n{TASKS}tokenizer_source: base\n",
    "tokenizer_source a model": f"merge_method: linear\n{WEIGHTED}tokenizer_source: b\n",
    "tokenizer base": f"merge_method: ties\n{TASKS}tokenizer: {{source: base}}\n",
    "tokenizer a model": f"merge_method: linear\n{WEIGHTED}tokenizer: {{source: b}}\n",
    "the vocabulary of one of the models": (
        f"merge_method: linear\n{WEIGHTED.replace('model: b', 'model: words')}tokenizer_source: a\n"
    ),
    "embeddings of a token": (
        f"merge_method: linear\n{WEIGHTED}tokenizer: {{source: a, tokens: {{word3: {{source: b}}}}}}\n"
    ),
    "a padded vocabulary": f"merge_method: linear\n{WEIGHTED}tokenizer: {{source: a, pad_to_multiple_of: 8}}\n",
    "chat_template auto": f"merge_method: ties\n{TASKS}tokenizer_source: a\nchat_template: auto\n",
    "chat_template alpaca": f"merge_method: linear\n{WEIGHTED}tokenizer_source: a\nchat_template: alpaca\n",
    "chat_template chatml": f"merge_method: linear\n{WEIGHTED}tokenizer_source: a\nchat_template: chatml\n",
    "chat_template exaone": f"merge_method: linear\n{WEIGHTED}tokenizer_source: a\nchat_template: exaone\n",
    "chat_template llama3": f"merge_method: linear\n{WEIGHTED}tokenizer_source: a\nchat_template: llama3\n",
    "chat_template mistral": f"merge_method: linear\n{WEIGHTED}tokenizer_source: a\nchat_template: mistral\n",
    "chat_template a text": f"""\
merge_method: linear
{WEIGHTED}
tokenizer_source: a
chat_template: |
  {{% for message in messages %}}{{{{ message.content }}}}{{% endfor %}}
""",
    # ---------------------------------------------------------------------------------------------- several documents
    "two documents": """\
name: first
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.2}}
dtype: float32
---
merge_method: slerp
base_model: base
models: [{model: first}]
parameters: {t: [0.2, 0.6]}
dtype: float32
""",
    "documents in any order": """\
merge_method: linear
models:
  - {model: stack, parameters: {weight: 0.5}}
  - {model: mean, parameters: {weight: 0.2}}
dtype: float32
---
name: stack
merge_method: passthrough
slices:
  - sources: [{model: ball, layer_range: [0, 3]}]
  - sources: [{model: ball, layer_range: [1, 4]}]
dtype: float32
---
name: ball
merge_method: slerp
base_model: a
models: [{model: b}]
parameters: {t: 0.3}
dtype: float32
---
name: mean
merge_method: linear
slices:
  - sources:
      - {model: deep, layer_range: [0, 6], parameters: {weight: 1}}
      - {model: ball2, layer_range: [0, 6], parameters: {weight: 1}}
dtype: float32
---
name: ball2
merge_method: passthrough
slices:
  - sources: [{model: c, layer_range: [0, 4]}]
  - sources: [{model: c, layer_range: [0, 2]}]
dtype: float32
""",
}
"""By what each is about."""

WARNED = {
    "models that change between slices": "the weight of a",
    "multislerp, of task vectors": "has no such parameter",
    "task_arithmetic": "has no such parameter",
    "task_arithmetic, lambda": "has no such parameter",
    "a switch in steps": "has no such parameter",
    "an encoder and a decoder": "the gradient of `weight` has one value for all of them",
    "keys without effect": "some_note: unknown key",
    "chat_template chatml": "needs the tokens",
    "chat_template exaone": "needs the tokens",
    "chat_template llama3": "needs the tokens",
}
"""Those that mergeloom warns about, and what it says."""

REFUSED_HERE: dict[str, tuple[str, str]] = {
    "unrelated vocabularies": (
        f"merge_method: linear\n{WEIGHTED.replace('model: b', 'model: words')}",
        "the vocabularies of a and words are unrelated: 12 of 44 rows differ",
    ),
    "an empty layer_range": (
        """\
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources: [{model: b, layer_range: [2, 2]}]
merge_method: passthrough
""",
        "is empty",
    ),
    "a reversed layer_range": (
        """\
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources: [{model: b, layer_range: [3, 1]}]
merge_method: passthrough
""",
        "is reversed",
    ),
    "a chat template that is not valid Jinja": (
        f"merge_method: linear\n{WEIGHTED}tokenizer_source: a\nchat_template: '{{{{ messages | }}}} and no more'\n",
        "invalid Jinja template",
    ),
    "a value that isn't finite": (
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: .inf}\n",
        "must be a finite number",
    ),
    "weights that cancel out": (
        WEIGHTED.replace("0.3", "-0.6") + "merge_method: linear\n",
        "the weights sum to 0",
    ),
    "documents that don't need each other": (
        "name: one\nmerge_method: passthrough\nmodels: [{model: a}]\n---\n"
        "name: other\nmerge_method: passthrough\nmodels: [{model: b}]\n",
        "no stage uses 'one', 'other'",
    ),
}
"""What mergekit runs and mergeloom refuses, with what it says: the table in docs/mergekit.md has the reasons."""

REFUSED_THERE: dict[str, str] = {
    "a model listed twice": """\
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {density: 1, weight: 1}}
  - {model: a, parameters: {density: 1, weight: 1}}
parameters: {normalize: true, int8_mask: true}
""",
    "slices of a model that also sees": """\
slices:
  - sources: [{model: sees, layer_range: [0, 3]}]
  - sources: [{model: sees, layer_range: [1, 4]}]
merge_method: passthrough
""",
    "a mapping with a path alone": """\
merge_method: linear
models:
  - {model: {path: a}, parameters: {weight: 1}}
  - {model: {path: b}, parameters: {weight: 1}}
""",
    "an architecture of its own": (
        "merge_method: linear\nmodels: [{model: new}, {model: new2}]\nparameters: {weight: 1}\n"
    ),
}
"""What mergeloom runs and mergekit refuses."""
