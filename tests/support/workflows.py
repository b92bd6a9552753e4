"""Example workflows: from the browser's form to the server's, on a machine without models."""

from __future__ import annotations

import json
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
_NOTES = ("MarkdownNote", "Note")


def load_example(name: str, object_info: dict) -> dict[str, dict]:
    """An example as a graph that the server runs, as the browser would send it."""
    text = (EXAMPLES / f"{name}.json").read_text(encoding="utf-8")
    return to_graph(json.loads(text), object_info)


def to_graph(workflow: dict, object_info: dict) -> dict[str, dict]:
    """A saved workflow -> {node id: class_type, inputs}.

    Args:
        object_info: what the server says of its nodes at /object_info.

    Raises:
        ValueError: a node's saved values are not as many as it has widgets.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] in _NOTES:
            continue
        linked = {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
        widgets = _widget_names(object_info[node["type"]]["input"])
        if len(widgets) != len(node["widgets_values"]):
            raise ValueError(f"{node['type']} has the widgets {widgets}, its saved values are "
                             f"{node['widgets_values']}")  # fmt: skip
        values = dict(zip(widgets, node["widgets_values"], strict=True))
        values.pop(None, None)
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    return graph


def _widget_names(inputs: dict) -> list[str | None]:
    """Names of a node's widgets in order; None stands for a seed's "control after generate"."""
    names: list[str | None] = []
    for part in ("required", "optional"):
        for name, (kind, *options) in inputs.get(part, {}).items():
            settings = options[0] if options else {}
            if settings.get("forceInput") or not (isinstance(kind, list) or kind in _WIDGETS):
                continue
            names.append(name)
            if settings.get("control_after_generate"):
                names.append(None)
    return names


def use_tiny_models(graph: dict[str, dict]) -> None:
    """Give an example the models that `conftest.comfy` has, and little to sample."""
    drop_text_encoder(graph)
    set_inputs(graph, "UNETLoader", unet_name="flux.safetensors")
    set_inputs(graph, "MXFP8Load", model_name="flux-mxfp8.safetensors")
    set_inputs(graph, "VAELoader", vae_name="vae.safetensors")
    set_inputs(graph, "EmptySD3LatentImage", width=64, height=64)
    set_inputs(graph, "MXFP8CompareModels", steps=1)  # it samples nine times


def set_inputs(graph: dict[str, dict], class_type: str, **inputs) -> None:
    """Change inputs on every node of a class."""
    for node in graph.values():
        if node["class_type"] == class_type:
            node["inputs"].update(inputs)


def drop_text_encoder(graph: dict[str, dict]) -> None:
    """Replace prompts by a conditioning that needs no text encoder; drop the encoder's loader."""
    for key, node in list(graph.items()):
        if node["class_type"] == "CLIPTextEncode":
            graph[key] = {"class_type": "LotusConditioning", "inputs": {}}
        elif node["class_type"] in ("CLIPLoader", "MXFP8LoadTextEncoder"):
            del graph[key]


def find(graph: dict[str, dict], class_type: str) -> list[str]:
    """Ids of the nodes of a class, in order."""
    return [key for key, node in graph.items() if node["class_type"] == class_type]
