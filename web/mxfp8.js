/**
 * The one seam to ComfyUI's page: a report view on each of our nodes that sends a document, and our
 * settings.
 *
 * The view appears with a node's first document, not before. It is no part of a saved workflow:
 * ComfyUI leaves out a widget whose `serialize` is false, in the workflow by the widget's own, in
 * the prompt by that of its options.
 */

import { app } from "../../scripts/app.js";
import { ReportView } from "./report.mjs";

const NAME = "mxfp8_report"; // the key of a document in a node's output, and the widget's name
const TYPE = "MXFP8_REPORT_VIEW";
const PREFIX = "MXFP8";
const PROGRESS = "$$node-text-preview"; // ComfyUI's widget for texts while a node runs
const WIDTH = 480; // px: the tools are on one line
const PRECISION = "MXFP8.DefaultPrecision";

/** Show what a node's output holds, if it holds a document. */
function show(node, output) {
  const [text] = output?.[NAME] ?? [];
  if (typeof text !== "string") return;
  const progress = node.widgets?.find((w) => w.name === PROGRESS);
  if (progress) node.removeWidget(progress); // its last text is the view's first
  const widget = node.widgets?.find((w) => w.name === NAME) ?? addView(node);
  widget.view.show(text, output.text?.[0] ?? "");
}

function addView(node) {
  const view = new ReportView();
  const widget = node.addDOMWidget(NAME, TYPE, view.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => ReportView.height,
  });
  widget.serialize = false;
  widget.view = view;
  view.element.addEventListener("wheel", (event) => {
    // Nodes 2.0 hands the wheel to the canvas itself.
    if (!LiteGraph.vueNodesMode && !view.scrolls()) app.canvas.processMouseWheel(event);
  });
  const removed = widget.onRemove;
  widget.onRemove = function () {
    view.dispose();
    return removed?.call(this);
  };
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, WIDTH), Math.max(node.size[1], height)]);
  return widget;
}

/** The node of a key in ComfyUI's table of outputs: "id", or "subgraph:id". */
function nodeOf(key) {
  const parts = String(key).split(":");
  const id = parts.pop();
  const graph = parts.length ? app.rootGraph.subgraphs?.get(parts[0]) : app.rootGraph;
  return graph?.getNodeById(Number(id));
}

app.registerExtension({
  name: "mxfp8.report",
  settings: [
    {
      id: PRECISION,
      category: ["MXFP8", "Nodes", "Default precision"],
      name: "Default precision",
      tooltip: "What `precision` is on nodes that are added from now on.",
      type: "combo",
      options: ["auto", "exact", "fast"],
      defaultValue: "auto",
    },
    {
      id: "MXFP8.KeepFolds",
      category: ["MXFP8", "Memory", "Keep folded weights"],
      name: "Keep folded weights",
      tooltip:
        "On Hopper and Ada, weights are rewritten for FP8 tensor cores. Kept, they take free GPU " +
        "memory, and are given up when it is needed; else they are made again on every step. " +
        "A server for several users (--multi-user) goes by MXFP8_KEEP_FOLDS=0 instead.",
      type: "boolean",
      defaultValue: true,
    },
  ],
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith(PREFIX)) return;
    const precision = node.widgets?.find((widget) => widget.name === "precision");
    // A node from a workflow gets its saved values after this.
    const chosen = app.extensionManager.setting.get(PRECISION);
    if (precision && chosen) precision.value = chosen;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      show(this, output);
    };
  },
  onNodeOutputsUpdated(outputs) {
    // Another workflow was opened: what its nodes put out earlier is there, but they did not run.
    for (const [key, output] of Object.entries(outputs)) {
      const node = nodeOf(key);
      if (node?.comfyClass?.startsWith(PREFIX)) show(node, output);
    }
  },
});
