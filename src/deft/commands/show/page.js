"use strict";
const { kinds, rows, weights } = JSON.parse(document.getElementById("rows").textContent);
const [panel, tip, place] = ["row", "tip", "place"].map((id) => document.getElementById(id));
const [previous, next] = ["previous", "next"].map((id) => document.getElementById(id));
const [source, fate, shortest, longest] = ["source", "fate", "shortest", "longest"].map((id) => document.getElementById(id));
let chosen = rows;
let at = 0;

function made(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;  // Text only: what a row says never becomes markup.
  return element;
}

function choose() {
  const from = Number(shortest.value || 0);
  const to = longest.value === "" ? Infinity : Number(longest.value);
  chosen = rows.filter((row) =>
    (!source.value || row.source === source.value) && (!fate.value || row.fate === fate.value) &&
    row.tokens >= from && row.tokens <= to);
  show(0);
}

function show(index) {
  at = Math.max(0, Math.min(index, chosen.length - 1));
  tip.hidden = true;
  place.textContent = chosen.length ? `${at + 1} of ${chosen.length}` : "no row";
  previous.disabled = at === 0;
  next.disabled = at >= chosen.length - 1;
  panel.replaceChildren(...(chosen.length ? drawn(chosen[at]) : [made("p", "faint", "No row passes the filter.")]));
  if (chosen.length) history.replaceState(null, "", "#" + encodeURIComponent(chosen[at].row));
}

function drawn(row) {
  const heading = made("h2", "", row.row);
  heading.append(made("span", "fate fate-" + row.fate, row.fate.replace("_", " ")), made("span", "", row.shape));
  if (row.tokens) {
    const share = Math.round((100 * row.learnt) / row.tokens);
    heading.append(made("span", "", `${row.tokens} tokens, ${row.learnt} learnt (${share} %)`));
  }
  const parts = [heading];
  if (row.reason) parts.push(made("p", "reason", row.reason));
  for (const [level, note] of row.notes) parts.push(made("p", level, note));
  for (const [role, words] of row.words) parts.push(made("p", "faint", role), made("pre", "", words));
  row.texts.forEach((text, number) => {
    if (row.texts.length > 1) parts.push(made("p", "faint", `text ${number + 1} of ${row.texts.length}`));
    parts.push(tokens(text));
  });
  if (row.left) parts.push(made("p", "faint", `... and ${row.left} more tokens`));
  return parts;
}

function tokens(text) {
  const block = made("pre", "", "");
  const graded = text.weights.flatMap(([grade, count]) => Array(count).fill(grade));
  text.kinds.forEach((kind, position) => {
    const [id, shown, isSpecial] = kinds[kind];
    const element = made("span", `token w${graded[position]}${isSpecial ? " special" : ""}`, shown);
    element.about = `position ${position}\nid ${id}\ntext ${JSON.stringify(shown)}\nweight ${weights[graded[position]]}`;
    block.append(element);
  });
  return block;
}

function explain(event) {
  const about = event.target.about;
  tip.hidden = !about;
  if (!about) return;
  tip.textContent = about;
  const box = event.target.getBoundingClientRect();
  tip.style.left = Math.max(0, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + scrollX + "px";
  const above = box.top - tip.offsetHeight - 6;
  tip.style.top = (above > 60 ? above : box.bottom + 6) + scrollY + "px";
}

panel.addEventListener("pointerover", explain);
panel.addEventListener("pointerleave", () => { tip.hidden = true; });
previous.addEventListener("click", () => show(at - 1));
next.addEventListener("click", () => show(at + 1));
[source, fate, shortest, longest].forEach((control) => control.addEventListener("input", choose));
document.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: chosen.length - 1 }[event.key];
  if (move === undefined || ["INPUT", "SELECT"].includes(event.target.tagName) || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  show(move);
});
addEventListener("hashchange", () => show(chosen.findIndex((row) => "#" + encodeURIComponent(row.row) === location.hash)));
show(rows.findIndex((row) => "#" + encodeURIComponent(row.row) === location.hash));
