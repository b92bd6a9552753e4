/** "Convert this model to MXFP8" in the context menu of nodes that load a model's file. */

import { app } from "../../scripts/app.js";
import { t } from "./language.mjs";
import { filesOf } from "./loaders.mjs";

/** Add a Convert File node for a file beside the node that loads it. */
function addConversion(loader, file) {
  const { graph } = loader;
  const node = LiteGraph.createNode("MXFP8ConvertFile");
  if (!node) return; // the server has no such node
  app.canvas.emitBeforeChange(); // a step of its own to undo
  try {
    node.pos = [loader.pos[0] + loader.size[0] + 40, loader.pos[1]];
    graph.add(node);
    const source = node.widgets.find((widget) => widget.name === "source");
    source.value = file;
    source.callback?.(file);
  } finally {
    app.canvas.emitAfterChange(); // else no later change could be undone
  }
  app.canvas.selectNode?.(node);
}

app.registerExtension({
  name: "mxfp8.menu",
  getNodeMenuItems(node) {
    const files = filesOf(node);
    return files.map((file) => ({
      content: files.length > 1
        ? t("Convert [file] to MXFP8", { file: file.split("/").pop() })
        : t("Convert this model to MXFP8"),
      callback: () => addConversion(node, file),
    }));
  },
});
