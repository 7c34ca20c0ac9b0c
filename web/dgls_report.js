// The panel of the DGLS Report node: plan, residency map and timeline as DOM and SVG.
//
// It is drawn when the node has run, from the data that came with that run, and never otherwise.
import { app } from "../../scripts/app.js";

const NODE = "DGLSReport";
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600;
const COLORS = {
  resident: "#4c72b0",
  streamed: "#dd8452",
  compute: "#55a868",
  copy: "#dd8452",
  stall: "#c44e52",
};
const STYLE = `
.dgls { font: 12px/1.4 system-ui, sans-serif; color: var(--input-text, #ddd); padding: 6px;
  box-sizing: border-box; overflow: auto; background: var(--comfy-input-bg, #222);
  border-radius: 6px; height: 100%; }
.dgls h4 { margin: 8px 0 2px; font-weight: 600; font-size: 12px; }
.dgls p { margin: 0 0 4px; }
.dgls svg { width: 100%; height: auto; display: block; }
.dgls text { fill: currentColor; font-size: 10px; }
.dgls dl { display: grid; grid-template-columns: auto 1fr; gap: 0 10px; margin: 0; }
.dgls dt { opacity: 0.7; } .dgls dd { margin: 0; }
.dgls .key { display: inline-block; width: 10px; height: 10px; margin: 0 4px 0 10px;
  border-radius: 2px; }
.dgls button { float: right; font: inherit; cursor: pointer; }
`;

function element(name, text, parent) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function shape(name, attributes, parent, tip) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (tip) {
    const title = document.createElementNS(SVG, "title");
    title.textContent = tip;
    made.append(title);
  }
  parent.append(made);
  return made;
}

function picture(height, label, parent) {
  return shape("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label }, parent);
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count.toFixed(unit ? 2 : 0)} ${units[unit]}`;
}

function milliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 2 : 1)} ms`;
}

function legend(entries, parent) {
  for (const [name, color] of entries) {
    const key = element("span", undefined, parent);
    key.className = "key";
    key.style.background = color;
    element("span", name, parent);
  }
}

/** One column for each block: what of it stays on the device, and what is streamed. */
function drawResidency(data, parent) {
  const title = element("h4", "Residency", parent);
  legend([["resident", COLORS.resident], ["streamed", COLORS.streamed]], title);
  const height = 70;
  const svg = picture(height, "residency of each block", parent);
  const most = Math.max(1, ...data.blocks.map((block) => block[1] + block[2]));
  const width = WIDTH / Math.max(1, data.blocks.length);
  data.blocks.forEach(([name, resident, streamed], index) => {
    const tip = `${index}: ${name}\n${bytes(resident)} resident, ${bytes(streamed)} streamed`;
    const x = index * width;
    const gap = Math.min(2, width / 5);
    const full = (height - 4) / most;
    const box = (y, size, fill) =>
      shape("rect", { x, y, width: width - gap, height: size, fill }, svg, tip);
    box(height - resident * full, resident * full, COLORS.resident);
    box(height - (resident + streamed) * full, streamed * full, COLORS.streamed);
  });
}

/** Two lanes, copies above and the blocks below, with the time that compute waited for weights. */
function drawTimeline(data, parent) {
  if (!data.timeline.length) return;
  const title = element("h4", "Last passes", parent);
  legend(
    [["copy", COLORS.copy], ["compute", COLORS.compute], ["waiting", COLORS.stall]],
    title,
  );
  const height = 74;
  const left = 52;
  const svg = picture(height, "timeline of copies and blocks", parent);
  const first = Math.min(...data.timeline.map((use) => use[5]));
  const last = Math.max(...data.timeline.map((use) => use[7]));
  const scale = (WIDTH - left - 4) / Math.max(1e-6, last - first);
  const bar = (from, to, y, fill, tip) => {
    const start = Math.max(from, first);
    if (to <= start) return;
    const x = left + (start - first) * scale;
    const width = Math.max(0.5, (to - start) * scale - 0.3);
    shape("rect", { x, y, width, height: 22, fill }, svg, tip);
  };
  for (const [block, pass, size, copyStart, copyEnd, wait, start, end] of data.timeline) {
    const name = `pass ${pass}, ${block}`;
    if (size) {
      const took = milliseconds(copyEnd - copyStart);
      bar(copyStart, copyEnd, 4, COLORS.copy, `${name}\n${bytes(size)} copied in ${took}`);
    }
    bar(start, end, 32, COLORS.compute, `${name}\ncomputed in ${milliseconds(end - start)}`);
    bar(wait, start, 32, COLORS.stall, `${name}\nwaited ${milliseconds(start - wait)}`);
  }
  shape("text", { x: 0, y: 18 }, svg).textContent = "copy";
  shape("text", { x: 0, y: 46 }, svg).textContent = "compute";
  shape("text", { x: left, y: 70 }, svg).textContent = "0";
  const end = shape("text", { x: WIDTH - 4, y: 70, "text-anchor": "end" }, svg);
  end.textContent = milliseconds(last - first);
}

function facts(data, parent) {
  const list = element("dl", undefined, parent);
  const fact = (name, value) => {
    if (value === null || value === undefined) return;
    element("dt", name, list);
    element("dd", value, list);
  };
  const used = data.outside_bytes + data.arena_bytes;
  fact("memory", `${bytes(used)} of ${bytes(data.vram_bytes)} on ${data.device}`);
  fact("ring", data.ring_bytes ? bytes(data.ring_bytes) : "none");
  fact("passes", `${data.passes}`);
  if (data.pass_ms !== null) {
    const share = (100 * data.stall_ms) / Math.max(data.pass_ms, 1e-9);
    fact("a pass takes", milliseconds(data.pass_ms));
    fact("of which waiting", `${milliseconds(data.stall_ms)} (${share.toFixed(1)} %)`);
  }
  if (data.bytes_per_s) fact("copies", `${(data.bytes_per_s / 1e9).toFixed(1)} GB/s`);
  if (data.efficiency !== null) {
    fact("efficiency", `${(100 * data.efficiency).toFixed(1)} % of the bound (${data.limit})`);
  }
  fact("out of turn", `${data.mispredicted} of ${data.uses} uses, ${data.on_demand} on demand`);
}

function draw(panel, data, text) {
  panel.replaceChildren();
  const copy = element("button", "Copy", panel);
  copy.title = "Copy the report as text";
  copy.onclick = () => navigator.clipboard?.writeText(text);
  if (data.reason) {
    element("p", `${data.model} is not streamed: ${data.reason}`, panel);
    return;
  }
  element("p", `${data.model}: ${data.summary}`, panel);
  facts(data, panel);
  drawResidency(data, panel);
  drawTimeline(data, panel);
}

app.registerExtension({
  name: "dgls.report",
  setup() {
    element("style", STYLE, document.head);
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = element("div");
    panel.className = "dgls";
    element("p", "Run the workflow to see the report.", panel);
    node.addDOMWidget("panel", "dgls_report", panel, {
      serialize: false,
      getMinHeight: () => 300,
    });
    node.setSize([Math.max(node.size[0], 440), Math.max(node.size[1], 420)]);
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      const data = output?.dgls_report?.[0];
      if (data) draw(panel, JSON.parse(data), output.text?.[0] ?? "");
    };
  },
});
