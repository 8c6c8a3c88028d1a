"""What a study's page brings into the browser: rules of its own, and the one script. Without the script the page is whole."""

from __future__ import annotations

from sim.html import STYLE

STUDY_STYLE = (
    STYLE
    + """
body { max-width: 76rem; }
h3 { margin: 0; font-size: 1rem; }
header p { max-width: 48rem; }
.question { font-size: 1.1rem; }
.notices {
  margin: .75rem 0 0; padding: .6rem .8rem .6rem 2rem; border-left: 4px solid var(--bad); background: var(--card); overflow-wrap: anywhere;
}
.waiting, .running { color: var(--soft); }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .15em; }
a:hover { text-decoration-thickness: 2px; }
:focus-visible { outline: 3px solid var(--c0); outline-offset: 1px; border-radius: .2rem; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; margin-bottom: .75rem; }
.controls[hidden] { display: none; }
.controls label { display: grid; gap: .15rem; color: var(--soft); font-size: .85rem; }
.controls input, .controls select, th button { font: inherit; color: var(--text); }
.controls input, .controls select {
  padding: .3rem .5rem; max-width: 16rem; font-size: .95rem; background: var(--page); border: 1px solid var(--line); border-radius: .35rem;
}
.controls output { color: var(--soft); padding-bottom: .35rem; }
.long { max-height: 75vh; overflow: auto; }
.long thead th { position: sticky; top: 0; background: var(--card); }
th button {
  position: relative; padding: 0 1em 0 0; border: 0; background: none; color: inherit; font-weight: inherit; text-align: inherit;
  cursor: pointer;
}
th button::after { content: "↕"; position: absolute; right: 0; bottom: 0; opacity: .45; }
th[aria-sort="ascending"] button::after { content: "↑"; opacity: 1; }
th[aria-sort="descending"] button::after { content: "↓"; opacity: 1; }
.text, .results tbody th { text-align: left; }
.results th, .results td { padding: .4rem .5rem; } .results tr > :first-child { padding-left: 0; }
.results td.text { white-space: normal; min-width: 4rem; }
.figures { display: grid; gap: 1.75rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.plot:not(.single) { grid-column: 1 / -1; } .charts > div { max-width: 30rem; } .single .charts { grid-template-columns: 1fr; }
.even .charts { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
.plot .charts p { font-size: .9rem; }
.keys { margin: .35rem 0 .6rem; }
.keys span { display: inline-flex; align-items: center; gap: .35rem; margin-right: 1.1rem; font-size: .9rem; }
.keys svg { width: 1rem; height: 1rem; flex: none; }
svg .mark { fill: var(--c); stroke: none; } svg .spread { stroke-width: 1.3; opacity: .75; }
svg .band { fill: var(--c); stroke: none; opacity: .16; } svg .diagonal { stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 1; }
svg image { image-rendering: pixelated; }
.setting > summary { font-size: 1rem; padding: .3rem 0; overflow-wrap: anywhere; }
.setting + .setting { border-top: 1px solid var(--line); margin-top: .5rem; padding-top: .5rem; }
.look {
  display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); align-items: start;
  margin: .5rem 0 1rem;
}
.look figcaption { margin-bottom: .3rem; }
.partition { max-width: 26rem; }
.run { margin-left: .25rem; } details.run + details.run { margin-top: .35rem; }
.run > summary { font-weight: 400; }
.run > div { margin: .4rem 0 .9rem; padding-left: .9rem; border-left: 2px solid var(--line); }
.run table { width: auto; font-size: .88rem; } .run dl { margin-top: .6rem; } .run dd pre { margin: .2rem 0 0; }
.run pre, .shared pre { white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .85em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  .results th, .results td { padding: .35rem .3rem; } .results tbody th { min-width: 6.2rem; }
  .run dl { grid-template-columns: 1fr; }
  .results td.text { min-width: 2.5rem; max-width: 6rem; overflow-wrap: anywhere; }
}
@media print {
  .controls { display: none; } .long { max-height: none; overflow: visible; } th button { padding: 0; } th button::after { content: ""; }
  .long thead th { position: static; } section { break-inside: auto; } .plot .charts > div, tr, .look { break-inside: avoid; }
  .wide { overflow: visible; } .results { font-size: .66rem; } .results thead th { font-size: inherit; }
  .results th, .results td { padding: .2rem .3rem; } .results tbody th { white-space: nowrap; }
}
"""
)

SCRIPT = """
"use strict";
(() => {
  const table = document.querySelector("table.results"), controls = document.querySelector(".controls");
  if (!table) return;
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const collator = new Intl.Collator("en", {numeric: true});
  const value = (row, column) => {
    const cell = row.cells[column], number = cell.dataset.v;
    return number === undefined ? cell.textContent : number === "" ? null : Number(number);
  };
  const compare = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null); // what is unknown stands last, either way
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const keys = new Map(rows.map(row => [row, value(row, column)]));
      rows.sort((one, two) => compare(keys.get(one), keys.get(two), sign));
      body.append(...rows);
    });
  });
  const text = controls.querySelector("input"), count = controls.querySelector("output");
  const choices = [...controls.querySelectorAll("select")];
  const words = new Map(rows.map(row => [row, [...row.cells].map(cell => cell.textContent).join(" ").toLowerCase()]));
  const filter = () => {
    const asked = text.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !asked.every(word => words.get(row).includes(word))
        || !choices.every(choice => !choice.value || row.cells[choice.dataset.column].textContent === choice.value);
      if (!row.hidden) shown += 1;
    }
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} lines`;
  };
  controls.addEventListener("input", filter);
  controls.addEventListener("change", filter);
  controls.hidden = false;
  filter();
})();
"""
