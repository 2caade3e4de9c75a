// Small drawings of quantities over updates: one line per configuration or cell, a band for the range behind a mean.
import { attribute, count, el, keyed, number, svg, text } from "./dom.js";

const WIDTH = 340, HEIGHT = 190, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 24;
const INSIDE = WIDTH - LEFT - RIGHT, TALL = HEIGHT - TOP - BOTTOM;

// Lines keep their colours while others come and go.
export class Colours {
  #known = new Map();

  of(ids) {
    for (const id of [...this.#known.keys()]) if (!ids.includes(id)) this.#known.delete(id);
    for (const id of ids) {
      if (this.#known.has(id)) continue;
      const taken = new Set(this.#known.values());
      let slot = 1;
      while (taken.has(slot)) slot += 1;
      this.#known.set(id, (slot - 1) % 8 + 1);
    }
    return this.#known;
  }
}

export function drawPanels(root, panels, curves, colours) {
  keyed(root, panels, (panel) => panel.key, makePanel, (figure, panel) => {
    const known = curves.filter((curve) => curve.lines[panel.key]).map((curve) => ({ ...curve, line: curve.lines[panel.key] }));
    draw(figure, panel, known, colours);
  });
}

function makePanel(panel) {
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0" },
    svg("g", { class: "grid" }), svg("g", { class: "bands" }), svg("g", { class: "lines" }), svg("g", { class: "cross", visibility: "hidden" }, svg("line", { y1: TOP, y2: HEIGHT - BOTTOM })));
  const figure = el("figure", { class: "panel live-panel" },
    el("figcaption", {}, el("strong", {}, panel.title), el("span", {}, panel.unit)), drawing);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    point(figure, (event.clientX - box.left) / box.width * WIDTH, event.clientX, event.clientY);
  });
  drawing.addEventListener("pointerleave", () => leave(figure));
  drawing.addEventListener("blur", () => leave(figure));
  drawing.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !figure.scale) return;
    event.preventDefault();
    const xs = [...new Set(figure.known.flatMap((curve) => curve.line.x))].sort((a, b) => a - b);
    const at = figure.at === undefined ? (step > 0 ? -1 : xs.length) : xs.indexOf(figure.at);
    const x = xs[Math.max(0, Math.min(xs.length - 1, at + step))], box = drawing.getBoundingClientRect();
    const place = figure.scale.x(x);
    point(figure, place, box.left + place / WIDTH * box.width, box.top + box.height / 3);
  });
  return figure;
}

function draw(figure, panel, known, colours) {
  figure.known = known;
  const highest = Math.max(1, ...known.flatMap((curve) => curve.line.x));
  const values = known.flatMap((curve) => [...curve.line.y, ...(curve.line.low ?? []), ...(curve.line.high ?? [])]).filter((y) => y !== null);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low >= 0 && low < 0.6 * high) low = 0;
  if (high - low < 1e-9) [low, high] = [low < 0 ? low - 0.5 : Math.max(0, low - 0.5), high + 0.5];
  const ticks = nice(low, high, 5);
  const step = ticks.length > 1 ? ticks[1] - ticks[0] : high - low;
  if (low !== 0) low -= 0.05 * (high - low);
  high = ticks[ticks.length - 1] > high - 0.3 * step ? Math.max(high, ticks[ticks.length - 1]) : high + 0.05 * (high - low);
  const scale = { x: (x) => LEFT + INSIDE * x / highest, y: (y) => TOP + TALL * (1 - (y - low) / (high - low)) };
  figure.scale = scale;
  const digits = Math.max(0, Math.min(6, Math.ceil(-Math.log10((ticks[1] ?? 1) - (ticks[0] ?? 0)) - 1e-9)));
  const lines = [
    ...ticks.map((y) => ({ key: `y${y}`, y: scale.y(y), words: Math.abs(y) >= 1e5 ? y.toExponential(0) : y.toFixed(digits).replace("-", "−") })),
    ...nice(0, highest, 4).filter((x) => x <= highest && Number.isInteger(x)).map((x) => ({ key: `x${x}`, x: scale.x(x), words: count(x) })),
  ];
  const [grid, bands, paths] = figure.querySelectorAll("svg > g");
  keyed(grid, lines, (each) => each.key, (each) => svg("g", {}, each.y !== undefined ? svg("line") : null, svg("text")), (node, each) => {
    const label = node.querySelector("text"), rule = node.querySelector("line");
    if (rule) for (const [name, value] of [["x1", LEFT], ["x2", WIDTH - RIGHT], ["y1", each.y], ["y2", each.y]]) attribute(rule, name, value);
    attribute(label, "x", each.x ?? LEFT - 6);
    attribute(label, "y", each.y !== undefined ? each.y + 3.5 : HEIGHT - 8);
    attribute(label, "text-anchor", each.y !== undefined ? "end" : each.x > WIDTH - 24 ? "end" : "middle");
    text(label, each.words);
  });
  const colour = (curve) => `c${colours.get(curve.id) ?? 8}`;
  keyed(bands, known.filter((curve) => curve.line.low), (curve) => curve.id, () => svg("path", {}), (node, { id, line }) => {
    attribute(node, "class", `band ${colour({ id })}`);
    const upper = line.x.map((x, i) => `${scale.x(x)},${scale.y(line.high[i] ?? line.y[i])}`);
    const lower = line.x.map((x, i) => `${scale.x(x)},${scale.y(line.low[i] ?? line.y[i])}`).reverse();
    attribute(node, "d", `M${[...upper, ...lower].join("L")}Z`);
  });
  keyed(paths, known, (curve) => curve.id, () => svg("g", {}, svg("path", {}), svg("circle", { r: 2.6 })), (node, { id, line }) => {
    attribute(node, "class", `line ${colour({ id })}`);
    attribute(node.firstChild, "d", stroke(line, scale));
    const last = line.y.length - 1;
    attribute(node.lastChild, "cx", scale.x(line.x[last]));
    attribute(node.lastChild, "cy", scale.y(line.y[last] ?? low));
  });
  const ends = known.map((curve) => `${curve.label}: ${number(curve.line.y[curve.line.y.length - 1])} at update ${count(Math.round(curve.line.x[curve.line.x.length - 1]))}`);
  attribute(figure.querySelector("svg"), "aria-label", `${panel.title} over updates. ${ends.join("; ")}`);
}

function stroke(line, scale) {
  let path = "", pen = "M";
  line.x.forEach((x, i) => {
    if (line.y[i] === null) { pen = "M"; return; }
    path += `${pen}${scale.x(x).toFixed(1)},${scale.y(line.y[i]).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

function nice(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((size) => size * power).find((size) => size >= rough * (1 - 1e-9));
  const ticks = [];
  for (let at = Math.ceil(low / step - 1e-9); at <= Math.floor(high / step + 1e-9); at += 1) ticks.push(at * step + 0);
  return ticks.length ? ticks : [low, high];
}

// The values at one place of all lines, beside the pointer.
function point(figure, place, left, top) {
  if (!figure.scale || !figure.known.length) return;
  const xs = figure.known.flatMap((curve) => curve.line.x);
  const x = xs.reduce((best, each) => Math.abs(figure.scale.x(each) - place) < Math.abs(figure.scale.x(best) - place) ? each : best, xs[0]);
  figure.at = x;
  const cross = figure.querySelector(".cross"), rule = cross.firstChild;
  attribute(cross, "visibility", "visible");
  attribute(rule, "x1", figure.scale.x(x));
  attribute(rule, "x2", figure.scale.x(x));
  const words = figure.known.map((curve) => {
    const i = curve.line.x.reduce((best, each, at) => Math.abs(each - x) < Math.abs(curve.line.x[best] - x) ? at : best, 0);
    return `${number(curve.line.y[i])}  ${curve.label}`;
  });
  const tip = document.getElementById("tooltip");
  text(tip, `update ${count(Math.round(x))}\n${words.join("\n")}`);
  tip.hidden = false;
  const own = tip.getBoundingClientRect();
  tip.style.left = `${Math.min(Math.max(left + 14, 8), innerWidth - own.width - 8)}px`;
  tip.style.top = `${Math.max(8, Math.min(top + 14, innerHeight - own.height - 8))}px`;
}

function leave(figure) {
  attribute(figure.querySelector(".cross"), "visibility", "hidden");
  delete figure.at;
  document.getElementById("tooltip").hidden = true;
}

// A curve for a line of a table.
export function spark(node, values) {
  const known = values.filter((value) => value !== null);
  const low = Math.min(0, ...known), high = Math.max(...known, low + 1e-9);
  const points = values.map((value, i) => value === null ? null
    : `${(2 + 86 * i / Math.max(1, values.length - 1)).toFixed(1)},${(20 - 17 * (value - low) / (high - low)).toFixed(1)}`);
  attribute(node.querySelector("polyline"), "points", points.filter(Boolean).join(" "));
  attribute(node, "visibility", known.length > 1 ? "visible" : "hidden");
}

export const makeSpark = () => svg("svg", { class: "spark", viewBox: "0 0 90 22", "aria-hidden": "true" }, svg("polyline"));
