/** Which of ComfyUI's nodes, and of ours, load which file. */

const TEXT_ENCODERS = "text_encoders";
const numbered = (name, count) => Array.from({ length: count }, (_, i) => `${name}${i + 1}`);

/** Class of a node -> the model folder, and the widgets that name files in it. */
const LOADERS = {
  UNETLoader: ["diffusion_models", ["unet_name"]],
  CheckpointLoaderSimple: ["checkpoints", ["ckpt_name"]],
  CLIPLoader: [TEXT_ENCODERS, ["clip_name"]],
  DualCLIPLoader: [TEXT_ENCODERS, numbered("clip_name", 2)],
  TripleCLIPLoader: [TEXT_ENCODERS, numbered("clip_name", 3)],
  QuadrupleCLIPLoader: [TEXT_ENCODERS, numbered("clip_name", 4)],
  MXFP8Load: ["diffusion_models", ["model_name"]],
  MXFP8LoadCheckpoint: ["checkpoints", ["checkpoint_name"]],
  MXFP8LoadTextEncoder: [TEXT_ENCODERS, ["name", "name2", "name3", "name4"]],
};

/** The safetensors files that a node loads, as Convert File lists them: "folder/name". */
export function filesOf(node) {
  const [folder, names] = LOADERS[node?.comfyClass] ?? [null, []];
  return names
    .map((name) => node.widgets?.find((widget) => widget.name === name)?.value)
    .filter((value) => typeof value === "string" && /\.(safetensors|sft)$/i.test(value))
    .map((value) => `${folder}/${value}`);
}

/**
 * The node that loads what comes into an input: through nodes that hand it on under the same name
 * (LoRAs, sampling settings) and through reroutes, which have one input. Null if there is none, or
 * if it is outside of the subgraph.
 */
export function loaderOf(node, input) {
  const seen = new Set();
  let origin = at(node, input);
  while (origin && !LOADERS[origin.comfyClass] && !seen.has(origin)) {
    seen.add(origin);
    origin = at(origin, input) ?? (origin.inputs?.length === 1 ? origin.getInputNode(0) : null);
  }
  return origin && LOADERS[origin.comfyClass] ? origin : null;
}

/** The file from which a node's calibration is loaded; null if it is not, or there is none. */
export function calibrationOf(node) {
  const origin = at(node, "calibration");
  if (origin?.comfyClass !== "MXFP8LoadCalibration") return null;
  return origin.widgets.find(({ name }) => name === "calibration_name").value;
}

function at(node, input) {
  const slot = node.inputs?.findIndex((i) => i.name === input) ?? -1;
  return slot < 0 ? null : node.getInputNode(slot);
}
