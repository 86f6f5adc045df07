"""Configurations of every merge method, as mergekit's documentation describes them; see `mergekit_configurations`."""

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

METHODS: dict[str, str] = {
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
}
