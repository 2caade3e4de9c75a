// The table of cells or configurations: the server filters, sorts and cuts it into pages; here it is shown.
import { ago, attribute, count, el, keyed, makeStateBar, number, stateBar, text } from "./dom.js";
import { makeSpark, spark } from "./curves.js";

const CELLS = [["", "draw"], ["label", "cell"], ["seed", "seed"], ["state", "state"], ["done", "updates"], ["reward", "reward", true], ["kl", "final KL", true], ["", "training reward"], ["at", "last news"]];
const CONFIGURATIONS = [["", "draw"], ["label", "configuration"], ["cells", "seeds"], ["done", "updates"], ["reward", "reward", true], ["kl", "final KL", true], ["at", "last news"]];

export function table(query, does) {
  const view = { q: query.get("q") ?? "", state: query.get("state") ?? "", sort: query.get("sort") ?? "", order: query.get("order") ?? "", page: Number(query.get("page")) || 0 };
  let chosenAxes = query.getAll("axis"), byCell = null, heads = [], waiting = 0;

  const heading = el("h2", {}, "Cells"), output = el("output", { class: "count" });
  const field = el("input", { type: "search", value: view.q, autocomplete: "off", spellcheck: "false", placeholder: "press /" });
  const state = el("select", {}, el("option", { value: "" }, "any"));
  const form = el("form", { class: "filters" }, el("label", {}, "Words", field), el("label", {}, "State", state), output);
  const head = el("tr"), body = el("tbody"), back = el("button", { type: "button", class: "quiet" }, "Back"), on = el("button", { type: "button", class: "quiet" }, "More");
  const place = el("output"), pager = el("nav", { class: "pager", "aria-label": "Pages of the table", hidden: true }, back, place, on);
  const whole = el("table", { class: "live-table" }, el("thead", {}, head), body);
  const node = el("div", {}, heading, form, el("div", { class: "scroll" }, whole), pager);

  const ask = (changes) => { Object.assign(view, { page: 0 }, changes); does.changed(); };
  form.addEventListener("submit", (event) => event.preventDefault());
  field.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => ask({ q: field.value }), 150); });
  state.addEventListener("change", () => ask({ state: state.value }));
  back.addEventListener("click", () => ask({ page: view.page - 1 }));
  on.addEventListener("click", () => ask({ page: view.page + 1 }));

  function makeHeads() {
    heads = byCell ? CELLS : CONFIGURATIONS;
    head.replaceChildren(...heads.map(([key, words, isNumber]) => el("th", { scope: "col", class: isNumber ? "number" : null, "data-sort": key || null },
      key ? el("button", { type: "button", onclick: () => sortBy(key, isNumber) }, words) : words)));
    body.replaceChildren();
  }
  // By a heading: first the way one wants it (numbers from the top), then the other way, then the grid's order.
  function sortBy(key, fromTop) {
    const first = fromTop ? "down" : "up", second = fromTop ? "up" : "down";
    if (view.sort !== key) ask({ sort: key, order: first });
    else if (view.order === first) ask({ order: second });
    else ask({ sort: "", order: "" });
  }
  function paintHeads() {
    for (const cell of head.children) {
      const own = cell.dataset.sort && cell.dataset.sort === view.sort;
      attribute(cell, "aria-sort", own ? (view.order === "down" ? "descending" : "ascending") : null);
    }
  }

  function makeRow(item) {
    const box = el("input", { type: "checkbox", "aria-label": `Draw ${item.label}${byCell && item.seed !== null ? `, seed ${item.seed}` : ""}` });
    box.addEventListener("change", () => does.toggle(item.id, box.checked));
    const bar = el("span", { class: "done" }, el("i")), updates = el("td", { class: "updates" }, bar, el("small"));
    const name = byCell ? el("a", { href: does.cell(item.id), title: item.id }) : el("span", { title: item.id });
    const cells = [el("td", { class: "draw" }, box), el("th", { scope: "row" }, name, el("small", { class: "detail" }))];
    if (byCell) cells.push(el("td", { class: "seed" }), el("td", {}, el("span", { class: "state-word" })), updates);
    else cells.push(el("td", { class: "seeds" }, makeStateBar(), el("small")), updates);
    cells.push(el("td", { class: "number reward" }), el("td", { class: "number kl" }));
    if (byCell) cells.push(el("td", { class: "wide" }, makeSpark()));
    cells.push(el("td", { class: "heard small" }));
    return el("tr", {}, ...cells);
  }
  function paintRow(row, item) {
    const part = (name) => row.querySelector(name);
    row.dataset.id = item.id;
    text(part("th > :first-child"), item.label);
    const done = byCell ? (item.updates ? item.update / item.updates : 0) : item.done;
    part(".done i").style.width = `${100 * Math.min(1, done)}%`;
    text(part(".updates small"), byCell ? `${count(item.update)}/${count(item.updates)}` : `${Math.floor(100 * done)}%`);
    text(part(".reward"), number(item.reward));
    text(part(".kl"), number(item.kl));
    ago(part(".heard"), item.at);
    if (byCell) {
      text(part(".seed"), item.seed === null ? "–" : String(item.seed));
      text(part(".state-word"), item.state);
      attribute(part(".state-word"), "data-state", item.state);
      attribute(part(".done"), "data-state", item.state);
      text(part(".detail"), ["finished", "running"].includes(item.state) ? "" : item.detail);
      part(".detail").title = item.detail;
      spark(part(".spark"), item.spark);
    } else {
      stateBar(part(".states-bar"), item.states);
      text(part(".seeds small"), Object.entries(item.states).map(([each, cells]) => `${cells} ${each}`).join(", "));
      part(".reward").title = item.low !== null ? `lowest seed ${number(item.low)}, highest ${number(item.high)}` : "";
    }
  }

  return {
    node,
    query() {
      const kept = new URLSearchParams();
      for (const [key, value] of Object.entries(view)) if (value) kept.set(key, value);
      for (const each of chosenAxes) kept.append("axis", each);
      return kept;
    },
    reset() { Object.assign(view, { sort: "", order: "", page: 0 }); },
    only(wanted) { state.value = view.state === wanted ? "" : wanted; ask({ state: state.value }); },
    axes(axes) {
      const labels = [...form.querySelectorAll("[data-axis]")];
      if (labels.length || !axes.length) return;
      for (const axis of axes) {
        const select = el("select", {}, el("option", { value: "" }, "any"), ...axis.values.map((value) => el("option", { value: `${axis.key}=${value}` }, value)));
        select.value = chosenAxes.find((each) => each.startsWith(`${axis.key}=`)) ?? "";
        select.addEventListener("change", () => {
          chosenAxes = [...form.querySelectorAll("[data-axis] select")].map((each) => each.value).filter(Boolean);
          ask({});
        });
        form.insertBefore(el("label", { "data-axis": axis.key }, axis.key.replace(/^(training|objective)\./, ""), select), output);
      }
    },
    chosen(states, chips) {
      keyed(state, [["", 0], ...Object.entries({ ...(view.state ? { [view.state]: 0 } : {}), ...states })], ([each]) => each,
        ([each]) => el("option", { value: each }, each || "any"), () => {});
      state.value = view.state;
      for (const chip of chips.children) attribute(chip, "aria-pressed", String(chip.dataset.state === view.state));
    },
    show(found, cells) {
      if (cells !== byCell) { byCell = cells; makeHeads(); }
      text(heading, byCell ? "Cells" : "Configurations");
      paintHeads();
      view.page = found.page;
      keyed(body, found.rows, (row) => row.id, makeRow, paintRow);
      this.repaint();
      text(output, `${count(found.total)} ${byCell ? "cell" : "configuration"}${found.total === 1 ? "" : "s"}`);
      pager.hidden = found.total <= found.size;
      back.disabled = found.page === 0;
      on.disabled = (found.page + 1) * found.size >= found.total;
      text(place, `${count(found.page * found.size + 1)}–${count(Math.min((found.page + 1) * found.size, found.total))} of ${count(found.total)}`);
    },
    repaint() {
      for (const row of body.rows) {
        const box = row.querySelector("input"), on_ = does.draws(row.dataset.id);
        box.checked = on_;
        attribute(box, "class", on_ ? `c${does.colour(row.dataset.id)}` : null);
      }
    },
  };
}
