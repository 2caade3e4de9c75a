// One cell: how it stands, its curves, its completions, what it printed, and what it is.
import { Source, address, say, trail } from "./live.js";
import { ago, attribute, count, duration, el, keyed, number, text } from "./dom.js";
import { Colours, drawPanels } from "./curves.js";

export function cell(root, parts) {
  const [name, id] = parts, source = new Source(), colours = new Colours();
  trail(["Runs", "#/"], [name, address(name)], [id, address(name, id)]);
  let told = "";
  const title = el("h1", { class: "big-title" }, id), state = el("span", { class: "state-word large" });
  const bar = el("span", { class: "done large" }, el("i")), facts = el("p", { class: "run-facts" }, el("span"), el("span", { class: "heard" }));
  const seeds = el("p", { class: "small seeds-row" }), detail = el("p", { class: "warning", hidden: true });
  const error = el("pre", { class: "error", tabindex: "0" }), errorBox = el("section", { hidden: true }, el("h2", {}, "Error"), error);
  const panels = el("div", { class: "live-panels" }), hint = el("p", { class: "lead", hidden: true }, "Nothing was measured yet: curves begin with the first update.");
  const evaluations = el("div"), completions = el("section", { hidden: true }, el("h2", {}, "Completions on held-out prompts"), evaluations);
  const attempts = el("tbody"), life = el("section", { hidden: true }, el("h2", {}, "Attempts"),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...["when", "event", ""].map((words) => el("th", { scope: "col" }, words)))), attempts)));
  const output = el("div"), outputBox = el("section", { hidden: true }, el("h2", {}, "Job output"), output);
  const settings = el("div", { class: "settings" }), what = el("section", {}, el("h2", {}, "Settings"), settings);
  root.append(title, el("p", { class: "small id" }, id), el("p", { class: "state-row" }, state, bar), facts, seeds, detail, errorBox,
    el("section", { "aria-label": "Curves" }, el("h2", {}, "Curves"), hint, panels), completions, life, outputBox, what);

  function show(found) {
    text(title, found.seed === null ? found.label : `${found.label}, seed ${found.seed}`);
    text(state, found.state);
    attribute(state, "data-state", found.state);
    attribute(bar, "data-state", found.state);
    bar.firstChild.style.width = `${100 * (found.updates ? Math.min(1, found.update / found.updates) : 0)}%`;
    const words = [`update ${count(found.update)} of ${count(found.updates)}`];
    if (found.reward !== null) words.push(`reward ${number(found.reward)}`);
    const kl = found.values?.reverse_kl ?? found.kl;
    if (kl !== null && kl !== undefined) words.push(`KL ${number(kl)}`);
    if (found.job) words.push(`job ${found.job}`);
    if (found.left !== null) words.push(`${duration(found.left)} until the time limit`);
    if (found.state === "running" && found.detail) words.push(found.detail);
    text(facts.firstChild, `${words.join(" · ")}${found.at ? " · last news " : ""}`);
    ago(facts.lastChild, found.at);
    const others = (found.seeds ?? []).filter((each) => each.id !== id);
    seeds.hidden = !others.length;
    if (seeds.childElementCount !== others.length) seeds.replaceChildren("Other seeds: ", ...others.map((each) => el("a", { href: address(name, each.id) }, String(each.seed ?? each.id))));
    const trouble = found.problem ?? (["finished", "running"].includes(found.state) || found.error ? "" : found.detail);
    detail.hidden = !trouble;
    text(detail, trouble);
    errorBox.hidden = !found.error;
    text(error, found.error ?? "");
    hint.hidden = found.panels.length > 0;
    drawPanels(panels, found.panels, found.curves, colours.of([id]));
    showCompletions(found.completions);
    life.hidden = !found.attempts.length;
    keyed(attempts, [...found.attempts].reverse(), (each) => `${each.at} ${each.event}`, () => el("tr", {}, el("td"), el("td"), el("td", { class: "small" })), (row, each) => {
      [new Date(each.at * 1000).toLocaleString(), each.event, each.details].forEach((words, k) => text(row.cells[k], words));
    });
    outputBox.hidden = !found.output.length;
    keyed(output, found.output, (each) => each.file, (each) => el("div", {}, el("h3", {}, each.file), el("pre", { tabindex: "0" })), (box, each) => text(box.lastChild, each.text));
    what.hidden = !found.settings.length;
    keyed(settings, found.settings, (each) => each.section, (each) => el("div", { class: "section" }, el("h3", {}, each.section), el("dl")), (box, each) => {
      keyed(box.lastChild, each.entries, ([key]) => key, ([key]) => el("div", {}, el("dt", {}, key), el("dd")), (line, [, value]) => text(line.lastChild, value));
    });
    if (found.state !== told) { if (told) say(`${found.label}: ${found.state}`); told = found.state; }
  }

  // The newest evaluation is open, until the reader opens and closes for himself.
  function showCompletions(found) {
    completions.hidden = !found.length;
    const news = found.length && evaluations.firstElementChild?.dataset.key !== String(found[0].update);
    keyed(evaluations, found, (each) => each.update, (each) => {
      const box = el("details", { class: "evaluation" }, el("summary", { onclick: () => { evaluations.dataset.touched = "1"; } }, `after ${count(each.update)} update${each.update === 1 ? "" : "s"}`), el("div", { class: "samples" }));
      box.lastChild.append(...each.samples.map((sample) => el("div", { class: "sample" },
        el("span", { class: "text" }, el("span", { class: "prompt" }, sample.prompt), sample.completion), el("span", { class: "reward" }, number(sample.reward, 2)))));
      return box;
    }, () => {});
    if (news && !evaluations.dataset.touched) [...evaluations.children].forEach((box, k) => { box.open = k === 0; });
  }

  return {
    async refresh() {
      const found = await source.read(`api/runs/${encodeURIComponent(name)}/cells/${encodeURIComponent(id)}`);
      if (found && root.contains(title)) show(found);
    },
  };
}
