/** After a node wrote a model or a calibration, the page's lists of files have it. */

import { app } from "../../scripts/app.js";

const WRITERS = new Set([
  "MXFP8ConvertFile", "MXFP8ConvertFiles", "MXFP8RepairFile", "MXFP8SaveModel",
  "MXFP8SaveTextEncoder", "MXFP8SaveCheckpoint", "MXFP8SaveCalibration",
]);
const DELAY = 300; // ms, so that several nodes share a refresh
let timer;

/** What the page's key R does; without its messages where ComfyUI has that apart. */
async function refresh() {
  try {
    await (app.reloadNodeDefs?.() ?? app.refreshComboInNodes());
  } catch (error) {
    console.warn("MXFP8: the lists of files could not be refreshed; press R.", error);
  }
}

app.registerExtension({
  name: "mxfp8.files",
  nodeCreated(node) {
    if (!WRITERS.has(node.comfyClass)) return;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      clearTimeout(timer);
      timer = setTimeout(refresh, DELAY);
    };
  },
});
