/**
 * The extension of ComfyUI's page: a report view on each MXFP8 node that sends a document, and the
 * settings of this pack.
 *
 * A node has its view from the start, so that no result enlarges it over others; progress texts go
 * into the view too. It is not saved with a workflow: ComfyUI leaves a widget out of the workflow if
 * its own `serialize` is false, and out of the prompt if that of its options is. A reloaded page gets
 * the documents of earlier runs from the server's history.
 */

import { app } from "../../scripts/app.js";
import { excluding } from "./document.mjs";
import "./files.mjs";
import { t, translated, translateWith } from "./language.mjs";
import "./menu.mjs";
import "./plan.mjs";
import { ReportView } from "./report.mjs";

const NAME = "mxfp8_report"; // the key of the document in a node's output, and the widget's name
const TYPE = "MXFP8_REPORT_VIEW";
const PREFIX = "MXFP8";
const PROGRESS = "$$node-text-preview"; // ComfyUI's widget for progress texts
const WIDTH = 400; // px of a new node: shows the names of files
const IMAGES = { MXFP8CompareModels: 320 }; // px that a new node has for images
// The shapes of the views: "report" of nodes that send documents, "line" of those that say little.
const SHAPES = {
  MXFP8BackendReport: "report",
  MXFP8Calibrate: "report",
  MXFP8CompareModels: "report",
  MXFP8ConvertFile: "report",
  MXFP8InspectFile: "report",
  MXFP8Quantize: "report",
  MXFP8QuantizeTextEncoder: "report",
  MXFP8ConvertFiles: "text",
  MXFP8PlanConversion: "text",
  MXFP8Recommend: "text",
  MXFP8RepairFile: "text",
};
const PRECISION = "MXFP8.DefaultPrecision";
const RUNS = 20; // of the history that are looked through
let latest; // the id of the last prompt that began to run

/** Show a node's output: its document, or its text alone. Another node may have had its id. */
function show(node, output) {
  if (output?.mxfp8_node?.[0] !== node.comfyClass) return;
  const [document] = output?.[NAME] ?? [];
  const [summary] = output?.text ?? [];
  if (typeof (document ?? summary) !== "string") return;
  dropProgress(node); // the view shows its last text, the summary
  const view = viewOf(node) ?? addView(node);
  if (typeof document !== "string") {
    view.tell(summary, output.mxfp8_verdict?.[0]);
    return;
  }
  const [images] = output.mxfp8_images ?? [];
  const pairs = (images?.pairs ?? []).map(({ name, first, second }) => ({
    name: name.replace(/^seed (\d+)$/, (_, number) => t("seed [number]", { number })),
    first: address(first),
    second: address(second),
  }));
  view.show(document, summary ?? "", pairs, images?.labels, {
    verdict: output.mxfp8_verdict?.[0], budget: output.mxfp8_budget?.[0],
  });
}

/** Have the list of presets say what each is for. The values stay as they are. */
function titlePresets(node) {
  const preset = node.widgets?.find((widget) => widget.name === "preset");
  const titles = node.constructor.nodeData?.input?.required?.preset?.[1]?.mxfp8_titles;
  if (!preset || !titles) return;
  preset.options.getOptionLabel = (value) => (
    titles[value] ? t("[label]: ", { label: value }) + translated(titles[value]) : value
  );
}

/** Show what may stand in empty text inputs; ComfyUI itself does so in large ones only. */
function showExamples(node) {
  const { required, optional } = node.constructor.nodeData?.input ?? {};
  for (const widget of node.widgets ?? []) {
    const example = { ...required, ...optional }[widget.name]?.[1]?.placeholder;
    if (example) widget.options.placeholder = example;
  }
}

/** Where the server has an image of a node's output. */
function address(image) {
  return app.api.apiURL(`/view?${new URLSearchParams(image)}`);
}

/** Show a text of the work in progress in the view, where ComfyUI would enlarge the node for it. */
function showProgress({ detail }) {
  const node = nodeAt(String(detail.nodeId));
  const view = node && viewOf(node);
  if (!view) return;
  dropProgress(node);
  // ComfyUI shows these texts as HTML, so the server sends them escaped.
  view.progress(new DOMParser().parseFromString(detail.text, "text/html").body.textContent);
}

function dropProgress(node) {
  const progress = node.widgets?.find((w) => w.name === PROGRESS);
  if (progress) node.removeWidget(progress);
}

function viewOf(node) {
  return node.widgets?.find((w) => w.name === NAME)?.view;
}

function addView(node) {
  const view = new ReportView(SHAPES[node.comfyClass] ?? "line");
  const widget = node.addDOMWidget(NAME, TYPE, view.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => view.height,
  });
  widget.serialize = false;
  widget.view = view;
  view.element.addEventListener("wheel", (event) => {
    // Nodes 2.0 passes the wheel on to the canvas by itself.
    if (!LiteGraph.vueNodesMode && !view.scrolls()) app.canvas.processMouseWheel(event);
  });
  view.onOpen = (open) => {
    node.setSize([node.size[0], node.size[1] + (open ? view.rest : -view.rest)]);
    if (open) app.canvas.bringToFront(node);
  };
  const exclude = node.widgets.find((w) => w.name === "exclude");
  if (exclude) {
    view.exclude = (layers) => {
      app.canvas.emitBeforeChange(); // a step of its own to undo
      exclude.value = excluding(layers, exclude.value);
      app.canvas.emitAfterChange();
    };
  }
  const removed = widget.onRemove;
  widget.onRemove = function () {
    view.dispose();
    return removed?.call(this);
  };
  const serialized = node.onSerialize;
  node.onSerialize = function (data) {
    serialized?.call(this, data);
    if (view.open) data.size = [data.size[0], data.size[1] - view.rest]; // it opens closed
  };
  return view;
}

/** The node of a key in ComfyUI's node outputs: "id", or "subgraph:id". */
function nodeOf(key) {
  const parts = String(key).split(":");
  const id = parts.pop();
  const graph = parts.length ? root().subgraphs?.get(parts[0]) : root();
  return graph?.getNodeById(Number(id));
}

/** The node of a key in the history's outputs: "id", or "id:id" of one inside a subgraph. */
function nodeAt(key) {
  const parts = key.split(":");
  const id = parts.pop();
  const graph = parts.reduce((outer, part) => outer?.getNodeById(Number(part))?.subgraph, root());
  return graph?.getNodeById(Number(id));
}

/** The server's last runs, the newest first: {prompt: [number, id, nodes, about, ...], outputs}. */
async function pastRuns() {
  const answer = await app.api.fetchApi(`/history?max_items=${RUNS}`);
  return answer.ok ? Object.values(await answer.json()).reverse() : [];
}

/** Whether a prompt is of the workflow on the canvas. */
function isOf(graph, [, , , about]) {
  return root() === graph && about?.extra_pnginfo?.workflow?.id === graph.id;
}

/** Show the newest documents that the server has of this workflow, on nodes that have none. */
async function restore() {
  const graph = root();
  for (const { prompt, outputs } of await pastRuns()) {
    if (!isOf(graph, prompt)) continue;
    for (const [key, output] of Object.entries(outputs)) {
      const node = nodeAt(key);
      if (isOurs(node) && viewOf(node)?.summary === undefined) show(node, output);
    }
  }
}

/**
 * Show the results of nodes that need not run again, for which the server sends none: a plan, or the
 * result of other choices, may have replaced them. They are those of the newest run in which such a
 * node had all of this one's inputs; this node's last result may be of another model.
 */
async function showCached({ nodes: keys, prompt_id: id }) {
  latest = id;
  const ours = keys.map(String).filter((key) => {
    const node = nodeAt(key);
    return isOurs(node) && !node.constructor.nodeData?.output_node; // the server sends those
  });
  if (!ours.length) return;
  const graph = root();
  const answer = await app.api.fetchApi("/queue");
  const running = answer.ok ? (await answer.json()).queue_running : [];
  const runs = await pastRuns(); // this one is there if it has ended in the meantime
  const prompt = [...running, ...runs.map((run) => run.prompt)].find((queued) => queued[1] === id);
  if (latest !== id || !prompt || !isOf(graph, prompt)) return;
  const results = runs.flatMap(({ prompt: [, , nodes], outputs }) => (
    Object.entries(outputs).map(([key, output]) => [nodes, key, output])
  )).filter(([nodes, key, output]) => nodes[key] && output.mxfp8_node);
  for (const key of ours) {
    const node = nodeAt(key);
    const made = origin(prompt[2], key);
    const [, , output] = results.find(([nodes, other]) => origin(nodes, other) === made) ?? [];
    if (isOurs(node) && output && viewOf(node)?.summary !== output.text?.[0]) node.onExecuted(output);
  }
}

/**
 * What a node's result comes from: the classes and inputs of it and of all nodes that lead to it, which
 * are numbered as they are met. The server, too, has results of nodes with other ids.
 */
function origin(nodes, key) {
  const met = [key];
  const made = [];
  for (const at of met) { // grows
    const { class_type: kind, inputs } = nodes[at];
    made.push([kind, Object.entries(inputs).map(([name, value]) => {
      if (!Array.isArray(value) || !nodes[value[0]]) return [name, value];
      const [from, slot] = value;
      if (!met.includes(from)) met.push(from);
      return [name, { from: met.indexOf(from), slot }];
    })]);
  }
  return JSON.stringify(made);
}

/** Show what the page has of our nodes' outputs. */
function showOutputs(outputs) {
  for (const [key, output] of Object.entries(outputs)) {
    const node = nodeOf(key);
    if (isOurs(node)) show(node, output);
  }
}

/**
 * Put views where Nodes 2.0 keeps those of earlier nodes with the same ids: it does when all nodes are
 * made anew, to undo a change.
 */
function placeViews() {
  for (const node of app.canvas.graph?._nodes ?? []) {
    const view = viewOf(node);
    const old = view && document.querySelector(`[data-node-id="${node.id}"] .mxfp8-report`);
    if (old && old !== view.element) old.replaceWith(view.element);
  }
}

function isOurs(node) {
  return !!node?.comfyClass?.startsWith(PREFIX);
}

function hasOurs(graph) {
  return graph?._nodes?.some((n) => isOurs(n) || hasOurs(n.subgraph));
}

function root() {
  return app.rootGraph ?? app.graph;
}

app.registerExtension({
  name: "mxfp8.report",
  settings: [
    {
      id: PRECISION,
      category: ["MXFP8", "Nodes", "Default precision"],
      name: "Default precision",
      tooltip: "The initial value of `precision` on nodes that you add.",
      type: "combo",
      options: ["auto", "exact", "fast"],
      defaultValue: "auto",
    },
    {
      id: "MXFP8.LoRAsBesideWeights",
      category: ["MXFP8", "LoRAs", "LoRAs beside weights"],
      name: "LoRAs beside weights",
      tooltip:
        "On: LoRAs are computed beside the MXFP8 weights, which stay as they are: LoRAs are not " +
        "lost in quantizing again, and changing the strength does not reload the model. Off: " +
        "ComfyUI merges LoRAs into the weights and quantizes these again. With --multi-user this " +
        "setting is ignored; set the environment variable " +
        "MXFP8_LORAS_BESIDE_WEIGHTS=0 on the server instead.",
      type: "boolean",
      defaultValue: true,
    },
  ],
  async init() {
    const languages = await app.api.getCustomNodesI18n().catch(() => ({})); // an older server's
    const chosen = () => app.extensionManager.setting.get("Comfy.Locale");
    translateWith(() => languages[chosen()]?.mxfp8);
  },
  setup() {
    app.api.addEventListener("progress_text", (event) => queueMicrotask(() => showProgress(event)));
    app.api.addEventListener("execution_cached", ({ detail }) => {
      showCached(detail).catch(() => {}); // the server may be down
    });
  },
  nodeCreated(node) {
    if (!isOurs(node)) return;
    const precision = node.widgets?.find((widget) => widget.name === "precision");
    // A node in a loaded workflow gets its saved values after this.
    const chosen = app.extensionManager.setting.get(PRECISION);
    if (precision && chosen) precision.value = chosen;
    titlePresets(node);
    showExamples(node);
    addView(node);
    const [width, height] = node.computeSize();
    const room = IMAGES[node.comfyClass] ?? 0;
    node.setSize([Math.max(node.size[0], width, WIDTH), Math.max(node.size[1], height) + room]);
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      show(this, output);
    };
  },
  afterConfigureGraph() {
    placeViews();
    showOutputs(app.nodeOutputs ?? {});
    if (hasOurs(root())) restore().catch(() => {}); // the server may be down
  },
  onNodeOutputsUpdated(outputs) {
    // Another workflow was opened, with the outputs of earlier runs: `onExecuted` is not called.
    showOutputs(outputs);
  },
});
