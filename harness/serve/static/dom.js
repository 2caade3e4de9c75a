// Nodes from data: text is only ever text, and nodes stay the same while their contents change, so that the keyboard's
// focus, open parts and selections outlive every refresh.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
export const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

export function attribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

// The children of `parent` become one node per item: those of known keys are updated, others made and removed.
export function keyed(parent, items, key, make, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let node = known.get(name);
    known.delete(name);
    if (!node) {
      node = make(item);
      node.dataset.key = name;
    }
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
    update(node, item);
  }
  for (const node of known.values()) node.remove();
}

export const number = (value, digits = 3) =>
  value === null || value === undefined ? "–" : (Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(1) : value.toFixed(digits)).replace("-", "−");

export const count = (value) => value.toLocaleString("en").replaceAll(",", " ");

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

// A time in seconds since 1970, as time that has passed; kept true by `tick`.
export function ago(node, at) {
  if (at === null || at === undefined) {
    delete node.dataset.at;
    text(node, "");
    return;
  }
  node.dataset.at = at;
  node.title = new Date(at * 1000).toLocaleString();
  text(node, passed(at));
}

const passed = (at) => {
  const seconds = Date.now() / 1000 - at;
  return seconds < 5 ? "just now" : `${duration(seconds)} ago`;
};

export function tick(root) {
  for (const node of root.querySelectorAll("[data-at]")) text(node, passed(Number(node.dataset.at)));
}

// A bar with a part per state, and the words for those who do not see it.
export function stateBar(node, states) {
  const total = Object.values(states).reduce((sum, cells) => sum + cells, 0);
  attribute(node, "aria-label", Object.entries(states).map(([state, cells]) => `${cells} ${state}`).join(", "));
  keyed(node, Object.entries(states), ([state]) => state, ([state]) => el("span", { "data-state": state }),
    (part, [state, cells]) => { part.style.width = `${100 * cells / total}%`; part.title = `${cells} ${state}`; });
}

export const makeStateBar = () => el("div", { class: "states-bar", role: "img" });
