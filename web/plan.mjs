/**
 * What a node will do, on the node, before it is run: Convert File and the Quantize nodes.
 *
 * The server makes the plan in its queue, as the node MXFP8PlanConversion, when the inputs of a node
 * changed and nothing else is queued. It is sent beside the nodes of the last run, as the only one to be
 * executed: ComfyUI may forget the results of nodes that a prompt lacks. No client is named, so the
 * page's progress and outputs stay as they are, and afterwards the run is taken out of the history.
 */

import { app } from "../../scripts/app.js";
import { t, translated } from "./language.mjs";
import { calibrationOf, filesOf, loaderOf } from "./loaders.mjs";

const VIEW = "mxfp8_report"; // the widget with the report view
const KEY = "mxfp8_plan"; // of the node in the prompt
const SETTING = "MXFP8.PlanBeforeRuns";
const CHOICES = ["source", "target", "preset", "include", "exclude", "size_or_quality"];
const DELAY = 700; // ms without a change
const POLL = 200; // ms
const LIMIT = 60_000; // ms to wait for a plan that is queued
const SUBGRAPH_INPUT = -10; // the id of where links into a subgraph begin

/** Class of a node -> its input that a loader feeds, and the part of a checkpoint that it is. */
const PLANNED = {
  MXFP8ConvertFile: null,
  MXFP8Quantize: ["model", "diffusion model"],
  MXFP8QuantizeTextEncoder: ["clip", "text encoders"],
};

const waiting = new Map(); // node -> timer of its next or present plan
const blocked = new Set(); // nodes whose plan waits until the queue is empty
const shown = new WeakMap(); // node -> the inputs that its plan is of

/** What to ask of the server for a node: inputs of MXFP8PlanConversion, a sentence, or null. */
function question(node) {
  const inputs = {};
  for (const widget of node.widgets ?? []) {
    if (!CHOICES.includes(widget.name)) continue;
    const slot = node.inputs?.findIndex((i) => i.name === widget.name) ?? -1;
    if (slot >= 0 && node.isInputConnected(slot)) return null; // known when the node runs
    inputs[widget.name] = widget.value;
  }
  const calibration = calibrationOf(node);
  if (inputs.size_or_quality && calibration) inputs.calibration_name = calibration;
  const fed = PLANNED[node.comfyClass];
  if (!fed) return inputs.source ? [inputs] : null;
  const [input, part] = fed;
  const slot = node.inputs?.findIndex((i) => i.name === input) ?? -1;
  if (slot < 0 || !node.isInputConnected(slot)) return null;
  if (Number(node.getInputLink(slot)?.origin_id) === SUBGRAPH_INPUT) return null; // from outside
  const loader = loaderOf(node, input);
  const files = filesOf(loader);
  if (!files.length) {
    return t("it is made from a file, and what comes in here is not from a loader of one.");
  }
  const checkpoint = files[0].startsWith("checkpoints/");
  return files.map((source) => ({ ...inputs, source, ...(checkpoint && { part }) }));
}

/** Plan a node soon; later changes take the place of earlier ones. */
function plan(node) {
  cancel(node);
  if (!(node.comfyClass in PLANNED)) return;
  if (app.extensionManager.setting.get(SETTING) === false) return;
  waiting.set(node, setTimeout(() => attempt(node), DELAY));
}

function cancel(node) {
  clearTimeout(waiting.get(node));
  waiting.delete(node);
  blocked.delete(node);
}

async function attempt(node) {
  if (!node.graph) return cancel(node); // it was removed meanwhile, and has no links to follow
  const timer = waiting.get(node);
  const current = () => waiting.get(node) === timer && node.graph;
  const asked = question(node);
  const key = JSON.stringify(asked);
  if (asked === null || shown.get(node) === key) return;
  if (typeof asked === "string") return show(node, asked, key);
  try {
    const { exec_info } = await get("/prompt");
    if (exec_info.queue_remaining > 0) return blocked.add(node);
    const texts = [];
    for (const inputs of asked) {
      const text = await ask(inputs, current);
      if (text === null) return;
      texts.push(asked.length > 1 ? `${inputs.source}: ${text}` : text);
    }
    if (current()) show(node, texts.join("\n\n"), key);
  } catch {
    // the server is down, or does not know the node; running the node will say so
  }
}

/** The text of one plan; null if it was given up. */
async function ask(inputs, current) {
  const runs = Object.values(await get("/history?max_items=1"));
  const beside = runs.at(-1)?.prompt?.[2] ?? {};
  const prompt = { ...beside, [KEY]: { class_type: "MXFP8PlanConversion", inputs } };
  const { prompt_id: id } = await post("/prompt", { prompt, partial_execution_targets: [KEY] });
  if (!id) return null;
  for (let waited = 0; waited < LIMIT; waited += POLL) {
    const run = (await get(`/history/${id}`))[id];
    if (run) {
      await post("/history", { delete: [id] });
      return run.outputs?.[KEY]?.text?.[0] ?? null;
    }
    if (!current()) break;
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
  await post("/queue", { delete: [id] });
  await post("/history", { delete: [id] });
  return null;
}

async function get(route) {
  return (await app.api.fetchApi(route)).json();
}

async function post(route, body) {
  const answer = await app.api.fetchApi(route, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  return answer.ok && answer.headers.get("Content-Type")?.includes("json") ? answer.json() : {};
}

/**
 * Show a plan in the node's view, until the node is run: sizes, number of layers and what it takes,
 * then the warnings; the rest on a click.
 */
function show(node, text, key) {
  shown.set(node, key);
  const lines = text.split("\n");
  const warnings = lines.filter((line) => line.startsWith("WARNING"));
  const more = lines.findIndex((line) => /^[ (]|^WARNING/.test(line));
  const first = [...lines.slice(0, more < 0 ? lines.length : more), ...warnings];
  const plan = (part) => t("Plan: [plan]", { plan: part.map(inLanguage).join("\n") });
  const view = node.widgets?.find((widget) => widget.name === VIEW)?.view;
  view?.tell(plan(lines), { level: warnings.length ? "notice" : "", text: plan(first) });
}

/** A line of a plan in the page's language; in "  2: reason (layers)", the reason is what has words. */
function inLanguage(line) {
  const [, warning] = /^WARNING: (.+)$/.exec(line) ?? [];
  if (warning) return t("WARNING: [warning]", { warning: translated(warning) });
  const [, count, reason, layers] = /^( +\d+: )(.+)( \([^(]+\))$/.exec(line) ?? [];
  return reason ? count + translated(reason) + layers : translated(line);
}

/** Plan the Quantize nodes behind a loader whose file changed. */
function planBehind(loader) {
  for (const node of loader.graph?._nodes ?? []) {
    const [input] = PLANNED[node.comfyClass] ?? [];
    if (input && loaderOf(node, input) === loader) plan(node);
  }
}

function whenChanged(node, names, act) {
  for (const widget of node.widgets ?? []) {
    if (!names(widget.name)) continue;
    const { callback } = widget;
    widget.callback = function (...given) {
      const answer = callback?.apply(this, given);
      act(node);
      return answer;
    };
  }
}

app.registerExtension({
  name: "mxfp8.plan",
  settings: [
    {
      id: SETTING,
      category: ["MXFP8", "Nodes", "Plan before runs"],
      name: "Plan before runs",
      tooltip:
        "When you change what Convert File or a Quantize node is to do, it says what will come of " +
        "it: sizes, layers that are kept, time. ComfyUI's queue works that out from the file's " +
        "header when it is empty.",
      type: "boolean",
      defaultValue: true,
    },
  ],
  setup() {
    app.api.addEventListener("status", ({ detail }) => {
      if (detail?.exec_info?.queue_remaining === 0) [...blocked].forEach(plan);
    });
  },
  nodeCreated(node) {
    if (node.comfyClass in PLANNED) {
      whenChanged(node, (name) => CHOICES.includes(name), plan);
      const connected = node.onConnectionsChange;
      node.onConnectionsChange = function (...given) {
        connected?.apply(this, given);
        if (!app.configuringGraph) plan(this);
      };
      const executed = node.onExecuted;
      node.onExecuted = function (output) {
        executed?.call(this, output);
        cancel(this);
        shown.delete(this); // the result is there
      };
    } else if (filesOf(node).length || node.comfyClass?.includes("Load")) {
      whenChanged(node, () => true, planBehind);
    }
  },
});
