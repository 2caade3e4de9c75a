// The page: which view the address asks for, and the loop that asks the server what changed.
import { attribute, el, text, tick } from "./dom.js";
import { overview } from "./overview.js";
import { run } from "./run.js";
import { cell } from "./cell.js";

const SECONDS = 2;
const root = document.documentElement;
root.classList.add("js");
const view = document.getElementById("view");
const pulse = document.getElementById("pulse"), crumbs = document.getElementById("crumbs");

const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });
document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); view.focus(); });
let theme;
addEventListener("beforeprint", () => { theme = root.dataset.theme; root.dataset.theme = "light"; });
addEventListener("afterprint", () => { if (theme) root.dataset.theme = theme; else delete root.dataset.theme; });

// One address of the server: the answer where it changed since the last one, null where it did not.
export class Source {
  #tag = "";
  #url = "";

  async read(url) {
    if (url !== this.#url) { this.#url = url; this.#tag = ""; }
    const answer = await fetch(url, { headers: this.#tag ? { "If-None-Match": this.#tag } : {}, cache: "no-store" });
    if (url !== this.#url || answer.status === 304) return null;
    const found = await answer.json();
    if (!answer.ok) throw new Problem(found.problem ?? `the server answers ${answer.status}`);
    this.#tag = answer.headers.get("ETag") ?? "";
    return found;
  }
}

// What the server says is wrong with a run, as opposed to a server that says nothing.
export class Problem extends Error {}

// Addresses: #/ for all runs, #/RUN, #/RUN/CELL; what a table shows stands behind a question mark.
export const address = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;

function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  let parts = [];
  try { parts = path.split("/").filter(Boolean).map(decodeURIComponent); } catch { /* no address of ours: all runs */ }
  return { parts, query: new URLSearchParams(query) };
}

export function remember(query) {
  const [path] = location.hash.split("?"), words = query.toString();
  history.replaceState(null, "", `${path || "#/"}${words ? `?${words}` : ""}`);
}

export function trail(...steps) {
  const nodes = steps.map(([name, target], place) => place === steps.length - 1
    ? el("span", { "aria-current": "page" }, name) : el("a", { href: target }, name));
  crumbs.replaceChildren(...nodes.flatMap((node, place) => place ? [el("span", { "aria-hidden": "true" }, "/"), node] : [node]));
  document.title = `${steps.map(([name]) => name).reverse().join(" · ")}`;
}

export const say = (words) => text(document.getElementById("said"), words);

let current = null, heard = Date.now(), turn = 0, timer = 0;

async function look() {
  const mine = ++turn;
  clearTimeout(timer);
  try {
    await current.refresh();
    if (mine !== turn) return;
    heard = Date.now();
    beat("live", "live");
    complain(null);
  } catch (error) {
    if (mine !== turn) return;
    if (error instanceof Problem) { heard = Date.now(); beat("live", "live"); complain(error.message); }
    else beat("lost", `no answer for ${Math.round((Date.now() - heard) / 1000)} s: does klab serve still run?`);
  }
  tick(document);
  if (!document.hidden) timer = setTimeout(look, 1000 * SECONDS);
}

function beat(state, words) {
  attribute(pulse, "data-state", state);
  text(pulse, words);
}

function complain(words) {
  let box = document.getElementById("problem");
  if (!words) { box?.remove(); return; }
  if (!box) { box = el("p", { id: "problem", class: "problem", role: "alert" }); view.prepend(box); }
  text(box, words);
}

export const lookNow = () => look();
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });

function open() {
  const { parts, query } = route();
  document.getElementById("tooltip").hidden = true;
  view.replaceChildren();
  const make = parts.length >= 2 ? cell : parts.length === 1 ? run : overview;
  current = make(view, parts, query);
  scrollTo(0, 0);
  look();
}
addEventListener("hashchange", open);
addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.getElementById("tooltip").hidden = true;
  const writes = event.target.closest?.("input, select, textarea");
  if (event.key === "/" && !writes && !event.ctrlKey && !event.metaKey) {
    const field = view.querySelector("input[type=search]");
    if (field) { event.preventDefault(); field.focus(); }
  }
});
open();
