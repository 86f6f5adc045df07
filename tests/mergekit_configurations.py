"""Configurations as mergekit's documentation describes them, written to cover it: each is read by both programs.

Models are directories by the side of each other: ``base`` with the fine-tunes ``a``, ``b`` and ``c`` of 4 layers;
``deep`` of 6 layers; ``tied`` and ``tied2`` without a head; ``qwen`` and ``qwen2`` with biases; ``t5`` and ``t5b`` with
an encoder and a decoder; ``words`` with one more token; ``sees`` with a vision tower; ``new`` and ``new2`` of an
architecture that nobody knows; ``pickled`` without safetensors.
"""

from __future__ import annotations

WEIGHTED = """\
models:
  - {model: a, parameters: {weight: 0.6}}
  - {model: b, parameters: {weight: 0.3}}
"""
TASKS = """\
base_model: base
models:
  - {model: a, parameters: {weight: 0.6, density: 0.5}}
  - {model: b, parameters: {weight: 0.3, density: 0.7}}
  - {model: c, parameters: {weight: 0.4, density: 0.3}}
"""
PLAIN = "base_model: base\nmodels: [{model: a}, {model: b}, {model: c}]\n"
PAIR = "base_model: base\nmodels: [{model: base}, {model: a}]\n"

CONFIGURATIONS: dict[str, str] = {
    # ---------------------------------------------------------------------------------------------- linear
    "linear": f"merge_method: linear\n{WEIGHTED}dtype: float32\n",
    "linear, not normalized": f"merge_method: linear\n{WEIGHTED}parameters: {{normalize: false}}\n",
    "linear, a negative weight": """\
merge_method: linear
models:
  - {model: a, parameters: {weight: 1.5}}
  - {model: b, parameters: {weight: -0.25}}
  - {model: c, parameters: {weight: 0.5}}
""",
    "linear, gradients": """\
merge_method: linear
models:
  - model: a
    parameters:
      weight: [0, 0.3, 1]
  - model: b
    parameters:
      weight: [1, 0.5]
""",
    "linear, a gradient of one value": """\
merge_method: linear
models:
  - {model: a, parameters: {weight: [0.3]}}
  - {model: b, parameters: {weight: [1, 0.7, 0.6, 0.4, 0.2, 0.1]}}
""",
    "linear, a weight for all": "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1.0}\n",
    "linear, with a base": """\
merge_method: linear
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
parameters: {weight: 0.25}
""",
    "linear, numbers as text": """\
merge_method: linear
models:
  - {model: a, parameters: {weight: "0.5"}}
  - {model: b, parameters: {weight: 2e-1}}
""",
    "linear, bfloat16": f"merge_method: linear\n{WEIGHTED}dtype: bfloat16\n",
    "linear, out_dtype": f"merge_method: linear\n{WEIGHTED}dtype: float32\nout_dtype: float16\n",
    "linear, torch's dtype": f"merge_method: linear\n{WEIGHTED}dtype: torch.float16\n",
    "linear, float64": f"merge_method: linear\n{WEIGHTED}dtype: float64\n",
    # ---------------------------------------------------------------------------------------------- interpolation
    "slerp": "merge_method: slerp\nbase_model: base\nmodels: [{model: base}, {model: a}]\nparameters: {t: 0.3}\n",
    "slerp, the base not listed": "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.8}\n",
    "slerp, t beyond 1": "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 1.25}\n",
    "slerp, filters and gradients": """\
slices:
  - sources:
      - model: a
        layer_range: [0, 4]
      - model: b
        layer_range: [0, 4]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "slerp, layers of other numbers": """\
slices:
  - sources:
      - {model: deep, layer_range: [2, 6]}
      - {model: b, layer_range: [0, 4]}
merge_method: slerp
base_model: deep
parameters: {t: [0.1, "9e-1"]}
""",
    "nuslerp": f"merge_method: nuslerp\n{WEIGHTED}",
    "nuslerp, of task vectors": f"merge_method: nuslerp\nbase_model: base\n{WEIGHTED}",
    "nuslerp, by rows": f"merge_method: nuslerp\n{WEIGHTED}parameters: {{nuslerp_flatten: false}}\n",
    "nuslerp, by columns": (
        f"merge_method: nuslerp\n{WEIGHTED}parameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}\n"
    ),
    "multislerp": """\
merge_method: multislerp
models:
  - {model: a, parameters: {weight: 0.6}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.2}}
""",
    "multislerp, of task vectors": f"merge_method: multislerp\n{TASKS.replace('density', 'ignored')}",
    "multislerp, weights as they are": (
        f"merge_method: multislerp\n{WEIGHTED}parameters: {{normalize_weights: false}}\n"
    ),
    "karcher": "merge_method: karcher\nmodels: [{model: a}, {model: b}, {model: c}]\n",
    "karcher, two steps": """\
merge_method: karcher
models: [{model: a}, {model: b}, {model: c}]
parameters: {max_iter: 2, tol: 1e-9}
""",
    "nearswap": f"merge_method: nearswap\n{PAIR}parameters: {{t: 0.001}}\n",
    "nearswap, a gradient": f"merge_method: nearswap\n{PAIR}parameters: {{t: [1e-4, 1e-2]}}\n",
    "arcee_fusion": f"merge_method: arcee_fusion\n{PAIR}",
    "model_stock": f"merge_method: model_stock\n{PLAIN}",
    "model_stock, by rows": f"merge_method: model_stock\n{PLAIN}parameters: {{filter_wise: true}}\n",
    # ---------------------------------------------------------------------------------------------- task vectors
    "task_arithmetic": f"merge_method: task_arithmetic\n{TASKS.replace('density', 'ignored')}",
    "task_arithmetic, lambda": f"""\
merge_method: task_arithmetic
{TASKS.replace("density", "ignored")}
parameters: {{lambda: 0.7, normalize: true}}
""",
    "task_arithmetic, the base listed": """\
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - {model: a, parameters: {weight: [0.2, 1.2]}}
""",
    "ties": f"merge_method: ties\n{TASKS}",
    "ties, not normalized": (
        f"merge_method: ties\n{TASKS}parameters: {{normalize: false, lambda: 1.3, int8_mask: true}}\n"
    ),
    "ties, gradients and filters": """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "ties, densities 0 and 1": """\
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.6, density: 0}}
  - {model: b, parameters: {weight: 0.3, density: 1}}
""",
    "ties, rescaled": f"merge_method: ties\n{TASKS}parameters: {{rescale: true}}\n",
    "dare_linear": f"merge_method: dare_linear\n{TASKS}",
    "dare_linear, not rescaled": f"merge_method: dare_linear\n{TASKS}parameters: {{rescale: false}}\n",
    "dare_ties": f"merge_method: dare_ties\n{TASKS}",
    "dare_ties, normalized": f"merge_method: dare_ties\n{TASKS}parameters: {{normalize: on, lambda: 0.9}}\n",
    "della": f"merge_method: della\n{TASKS}parameters: {{epsilon: 0.1}}\n",
    "della_linear": """\
merge_method: della_linear
base_model: base
models:
  - {model: a, parameters: {weight: 0.6, density: 0.5, epsilon: 0.2}}
  - {model: b, parameters: {weight: 0.3, density: 0.7, epsilon: [0.1, 0.2]}}
parameters: {lambda: 1.1}
""",
    "breadcrumbs": f"merge_method: breadcrumbs\n{TASKS}parameters: {{gamma: 0.02}}\n",
    "breadcrumbs, the default gamma": f"merge_method: breadcrumbs\n{TASKS}",
    "breadcrumbs_ties": """\
merge_method: breadcrumbs_ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.6, density: 0.9, gamma: [0, 0.1]}}
  - {model: b, parameters: {weight: 0.3, density: 0.7, gamma: 0.05}}
parameters: {normalize: true}
""",
    "sce": f"merge_method: sce\n{PLAIN}",
    "sce, the most variable": f"merge_method: sce\n{PLAIN}parameters: {{select_topk: 0.3}}\n",
    "ram": f"merge_method: ram\n{PLAIN}",
    "ram, a threshold": f"merge_method: ram\n{PLAIN}parameters: {{epsilon: 0.002}}\n",
    "ramplus_tl": f"merge_method: ramplus_tl\n{PLAIN}parameters: {{epsilon: 0.002, r: 0.2, alpha: 0.4}}\n",
    # ---------------------------------------------------------------------------------------------- layers
    "passthrough": "merge_method: passthrough\nmodels: [{model: a}]\n",
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
    "multislerp, of task vectors": "has no such parameter",
    "task_arithmetic": "has no such parameter",
    "task_arithmetic, lambda": "has no such parameter",
    "a switch in steps": "has no such parameter",
    "anchors": "shared: unknown key",
    "keys without effect": "some_note: unknown key",
    "chat_template chatml": "needs the tokens",
    "chat_template exaone": "needs the tokens",
    "chat_template llama3": "needs the tokens",
}
"""Those that mergeloom warns about, and what it says."""

REFUSED_HERE: dict[str, tuple[str, str]] = {
    "a union of vocabularies": (f"merge_method: linear\n{WEIGHTED}tokenizer_source: union\n", "union of vocabularies"),
    "a union by default": (f"merge_method: linear\n{WEIGHTED}tokenizer: {{tokens: {{}}}}\n", "union of vocabularies"),
    "embeddings of a token": (
        f"merge_method: linear\n{WEIGHTED}tokenizer: {{source: a, tokens: {{word3: {{source: b}}}}}}\n",
        "choosing embeddings by token",
    ),
    "padding": (
        f"merge_method: linear\n{WEIGHTED}tokenizer: {{source: a, pad_to_multiple_of: 8}}\n",
        "padding the vocabulary",
    ),
    "other vocabularies": (
        f"merge_method: linear\n{WEIGHTED.replace('model: b', 'model: words')}tokenizer_source: a\n",
        "token 'word32' has no row in a and row 32 in words",
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
    "a layer_range that runs backwards": (
        """\
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources: [{model: b, layer_range: [3, 1]}]
merge_method: passthrough
""",
        "runs backwards",
    ),
    "a chat template that is no Jinja": (
        f"merge_method: linear\n{WEIGHTED}tokenizer_source: a\nchat_template: '{{{{ messages | }}}} and no more'\n",
        "no valid Jinja text",
    ),
    "a value that isn't finite": (
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: .inf}\n",
        "must be finite",
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
    "weights in pickles": ("merge_method: passthrough\nmodels: [{model: pickled}]\n", "pickles"),
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
