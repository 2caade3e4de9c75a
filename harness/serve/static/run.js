// One run: how far it is, its curves, its cells or configurations, its newest completions.
import { Source, address, lookNow, remember, say, trail } from "./live.js";
import { ago, attribute, count, duration, el, keyed, makeStateBar, number, stateBar, text } from "./dom.js";
import { Colours, drawPanels } from "./curves.js";
import { table } from "./table.js";

const MOST = 8;

export function run(root, parts, query) {
  const [name] = parts, base = `api/runs/${encodeURIComponent(name)}`;
  const sources = { head: new Source(), table: new Source(), curves: new Source(), feed: new Source() };
  const colours = new Colours();
  let byCell = query.get("by") === "cell", drawn = query.getAll("draw"), shown = [], latest = null, told = "";
  trail(["Runs", "#/"], [name, address(name)]);

  const title = el("h1", { class: "big-title" }, name), description = el("p", { class: "description" });
  const report = el("a", { class: "report-link", href: `runs/${encodeURIComponent(name)}/report/`, target: "_blank", rel: "noopener", hidden: true }, "Report ↗");
  const bar = makeStateBar(), chips = el("div", { class: "chips", role: "group", "aria-label": "Show only cells in a state" });
  const facts = el("p", { class: "run-facts" }, el("span"), el("span", { class: "heard" })), warning = el("p", { class: "warning", hidden: true });
  bar.classList.add("large");

  const kinds = el("div", { class: "toggle", role: "group", "aria-label": "Curves and table by" },
    ...["Configurations", "Cells"].map((words, k) => el("button", { type: "button", class: "quiet", onclick: () => switchTo(k === 1) }, words)));
  const legend = el("ul", { class: "curve-legend" }), panels = el("div", { class: "live-panels" });
  const hint = el("p", { class: "lead" });
  const lines = table(query, {
    changed: () => { keep(); lookNow(); },
    draws: (id) => shown.includes(id),
    colour: (id) => colours.of(shown).get(id),
    toggle: (id, on) => choose(on ? [...shown.filter((each) => each !== id), id].slice(-MOST) : shown.filter((each) => each !== id)),
    cell: (id) => address(name, id),
  });
  const feed = el("ul", { class: "feed" }), feedBox = el("section", { "aria-label": "Completions", hidden: true }, el("h2", {}, "Newest completions"), feed);
  root.append(
    el("div", { class: "title-row" }, el("div", {}, title, description), report),
    warning, bar, chips, facts,
    el("section", { "aria-label": "Curves" }, el("div", { class: "title-row" }, el("h2", {}, "Curves"), kinds), hint, legend, panels),
    el("section", { "aria-label": "Cells" }, lines.node), feedBox);

  function keep() {
    const kept = lines.query();
    if (byCell) kept.set("by", "cell");
    for (const id of drawn) kept.append("draw", id);
    remember(kept);
  }
  function choose(ids) {
    drawn = ids;
    keep();
    lookNow();
  }
  function switchTo(cells) {
    if (cells === byCell) return;
    byCell = cells;
    drawn = [];
    lines.reset();
    keep();
    lookNow();
  }

  function showHead(found) {
    latest = found;
    text(document.getElementById("place"), found.folder);
    text(description, found.description);
    description.hidden = !found.description;
    report.hidden = !found.report;
    report.title = found.report ? `written ${new Date(found.report * 1000).toLocaleString()}` : "";
    warning.hidden = !found.problem;
    text(warning, found.problem ?? "");
    stateBar(bar, found.states);
    keyed(chips, Object.entries(found.states), ([state]) => state,
      ([state]) => el("button", { type: "button", class: "chip", "data-state": state, onclick: () => lines.only(state) }, el("i"), el("b"), ` ${state}`),
      (chip, [, cells]) => text(chip.querySelector("b"), count(cells)));
    const words = [`update ${count(found.update)} of ${count(found.updates)}`];
    if (found.left !== null) words.push(`about ${duration(found.left)} left`);
    if (found.reward !== null) words.push(`mean reward ${number(found.reward)}`);
    text(facts.firstChild, `${words.join(" · ")} · last news `);
    ago(facts.lastChild, found.at ?? found.created);
    lines.axes(found.axes);
    const states = Object.entries(found.states).map(([state, cells]) => `${cells} ${state}`).join(", ");
    if (states !== told) { if (told) say(states); told = states; }
  }

  function showCurves(found) {
    shown = found.curves.map((curve) => curve.id);
    const known = colours.of(shown);
    keyed(legend, found.curves, (curve) => curve.id, (curve) => el("li", {}, el("i", { class: "swatch" }),
      byCell ? el("a", { href: address(name, curve.id) }) : el("span"), el("small"),
      el("button", { type: "button", class: "quiet", "aria-label": `Do not draw ${curve.label}`, onclick: () => choose(shown.filter((each) => each !== curve.id)) }, "×")),
    (node, curve) => {
      attribute(node.firstChild, "class", `swatch s${known.get(curve.id)}`);
      text(node.children[1], curve.label);
      text(node.querySelector("small"), byCell ? "" : curve.drawn < curve.cells ? `${curve.drawn} of ${curve.cells} seeds` : `${curve.cells} seed${curve.cells === 1 ? "" : "s"}`);
    });
    const begun = found.panels.length > 0;
    text(hint, !begun ? "Nothing was measured yet: curves begin with the first update."
      : byCell ? "Choose cells in the table. Shades: lowest and highest of the updates behind a point."
        : "Means over seeds, as far as all that have begun have come; shades: lowest and highest seed. Choose configurations in the table.");
    drawPanels(panels, found.panels, found.curves, known);
    lines.repaint();
  }

  function showFeed(found) {
    feedBox.hidden = !found.completions.length;
    keyed(feed, found.completions, (each) => `${each.cell} ${each.update} ${found.completions.indexOf(each)}`, (each) => el("li", { class: "completion" },
      el("p", { class: "small" }, el("a", { href: address(name, each.cell) }, each.label), ` · seed ${each.seed ?? "–"} · update ${count(each.update)}`),
      el("p", { class: "words" }, el("span", { class: "prompt" }, each.prompt), el("span", { class: "answer-text" }, each.completion)),
      el("p", { class: "reward", title: "reward" }, number(each.reward))), () => {});
  }

  return {
    async refresh() {
      for (const [k, button] of [...kinds.children].entries()) attribute(button, "aria-pressed", String(byCell === (k === 1)));
      const choice = new URLSearchParams(byCell ? { by: "cell" } : {});
      for (const id of drawn) choice.append("id", id);
      const wanted = [
        [sources.head, base, showHead],
        [sources.table, `${base}/${byCell ? "cells" : "configurations"}?${lines.query()}`, (found) => lines.show(found, byCell)],
        [sources.curves, `${base}/curves?${choice}`, showCurves],
        [sources.feed, `${base}/completions`, showFeed],
      ];
      const answers = await Promise.all(wanted.map(([source, url]) => source.read(url)));
      if (!root.contains(title)) return;
      answers.forEach((found, k) => { if (found) wanted[k][2](found); });
      lines.chosen(latest?.states ?? {}, chips);
    },
  };
}
