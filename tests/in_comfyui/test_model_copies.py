"""What the pack remembers of a model does not go along when the model is copied."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from comfyui import comfyui_path

pytestmark = pytest.mark.comfy

COPIES = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import comfy.options
comfy.options.enable_args_parsing()
import copy, json, pickle
import torch
from mxfp8.nodes.runtime import cache

model = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32) for name in ("q", "k", "out")})
stock = copy.deepcopy(model)
linears = list(model.values())
cache.attach(model, linears)
state = cache.model_state(model)
remembered = ("stays_stored", "changes", "called")
state.stays_stored.update(dict.fromkeys(linears, "a reason"))
state.changes.update(dict.fromkeys(linears, 0.01))
state.called.update(linears)


def empty(state):
    return not any(getattr(state, name) for name in ("shared_inputs", *remembered))


copies = {
    "linear": [copy.deepcopy(model["q"])],
    "model": list(copy.deepcopy(model).modules()),
    "pickled": list(pickle.loads(pickle.dumps(model)).modules()),
}
states = {how: {cache.model_state(m) for m in modules} for how, modules in copies.items()}
print(json.dumps({
    "copies": {how: [len(found), all(map(empty, found))] for how, found in states.items()},
    "all": len({state}.union(*states.values())),
    "kept": [len(getattr(state, name)) for name in remembered],
    "stock": [k for k in vars(stock) if k.startswith("mxfp8")],
}))
"""


def test_a_copy_starts_with_an_empty_state_that_its_layers_share():
    out = subprocess.check_output(
        [sys.executable, "-c", COPIES, comfyui_path(), "--cpu"], text=True
    )
    assert json.loads(out.splitlines()[-1]) == {
        "copies": {how: [1, True] for how in ("linear", "model", "pickled")},
        "all": 4,
        "kept": [3, 3, 3],
        "stock": [],
    }
