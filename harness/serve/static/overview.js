// All runs of the folder.
import { Source, address, lookNow, remember, trail } from "./live.js";
import { ago, count, duration, el, keyed, makeStateBar, number, stateBar, text } from "./dom.js";

export function overview(root, parts, query) {
  trail(["klab", "#/"]);
  const source = new Source();
  let page = Number(query.get("page")) || 0, words = query.get("q") ?? "";
  const field = el("input", { type: "search", value: words, autocomplete: "off", spellcheck: "false" });
  const list = el("ol", { class: "runs" }), empty = el("p", { class: "lead", hidden: true });
  const back = el("button", { type: "button", class: "quiet" }, "Back"), on = el("button", { type: "button", class: "quiet" }, "More");
  const shown = el("output"), pager = el("nav", { class: "pager", "aria-label": "Pages of runs", hidden: true }, back, shown, on);
  const filter = el("label", { class: "find" }, "Find a run", field);
  root.append(el("div", { class: "title-row" }, el("h1", { class: "big-title" }, "Runs"), filter), list, empty, pager);

  const ask = (next) => {
    page = next;
    const kept = new URLSearchParams();
    if (words) kept.set("q", words);
    if (page) kept.set("page", page);
    remember(kept);
    lookNow();
  };
  field.addEventListener("input", () => { words = field.value; ask(0); });
  back.addEventListener("click", () => ask(page - 1));
  on.addEventListener("click", () => ask(page + 1));

  return {
    async refresh() {
      const found = await source.read(`api/runs?${new URLSearchParams({ q: words, page })}`);
      if (!found) return;
      if (found.single !== null && !parts.length) { location.replace(address(found.single)); return; }
      text(document.getElementById("place"), found.folder);
      page = found.page;
      filter.hidden = !words && found.total < 6;
      keyed(list, found.runs, (each) => each.name, make, update);
      empty.hidden = found.total > 0;
      text(empty, words ? "No run has these words in its name." : "No runs here yet: `klab launch GRID` makes one, and it will appear.");
      pager.hidden = found.total <= found.size;
      back.disabled = page === 0;
      on.disabled = (page + 1) * found.size >= found.total;
      text(shown, `${page * found.size + 1}–${Math.min((page + 1) * found.size, found.total)} of ${found.total}`);
    },
  };
}

function make(each) {
  return el("li", { class: "run card" },
    el("div", { class: "run-head" }, el("h2", {}, el("a", { href: address(each.name) }, each.name)),
      el("a", { class: "report-link", href: `runs/${encodeURIComponent(each.name)}/report/`, hidden: true, target: "_blank", rel: "noopener" }, "Report ↗")),
    el("p", { class: "description" }), makeStateBar(), el("p", { class: "run-facts" }),
    el("p", { class: "small" }, el("span", { class: "size" }), el("span", { class: "heard" })), el("p", { class: "warning", hidden: true }));
}

function update(node, each) {
  const part = (name) => node.querySelector(name);
  text(part(".description"), each.description ?? "");
  part(".description").hidden = !each.description;
  const warning = part(".warning");
  warning.hidden = !each.problem;
  text(warning, each.problem ?? "");
  part(".report-link").hidden = !each.report;
  if (!each.states) {
    text(part(".run-facts"), each.reading ? "reading…" : "");
    part(".states-bar").hidden = true;
    return;
  }
  part(".states-bar").hidden = false;
  stateBar(part(".states-bar"), each.states);
  const words = Object.entries(each.states).map(([state, cells]) => `${count(cells)} ${state}`);
  if (each.left !== null) words.push(`about ${duration(each.left)} left`);
  text(part(".run-facts"), words.join(" · "));
  const configurations = `${count(each.configurations)} configuration${each.configurations === 1 ? "" : "s"}`;
  text(part(".size"), `${configurations}, ${count(each.cells)} cells${each.reward !== null ? `, mean reward ${number(each.reward)}` : ""}, last news `);
  ago(part(".heard"), each.at ?? each.created);
}
