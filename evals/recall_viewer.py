"""The script and style of the recall report. Texts enter the page by textContent only, never as markup."""

from __future__ import annotations

STYLE = """
svg .l{fill:var(--fg);font-size:10.5px}
svg .p{fill:var(--a)}svg .m{fill:var(--b)}svg .f{fill:none;stroke:var(--a);stroke-dasharray:4 3}
.drill{display:grid;grid-template-columns:320px 1fr;gap:20px}@media(max-width:760px){.drill{
grid-template-columns:1fr}}.list{align-self:start;max-height:560px;overflow-y:auto;border:1px solid var(--line)}
.list button{display:block;width:100%;text-align:left;font:inherit;font-size:13px;color:inherit;background:none;
border:0;border-bottom:1px solid var(--line);padding:5px 8px;cursor:pointer;overflow-wrap:anywhere}
.list button[aria-current=true]{background:var(--line)}
.bar{display:flex;gap:8px;flex-wrap:wrap;margin:8px 0}select,input{font:inherit;font-size:13px;max-width:100%}
.hit{border-left:3px solid var(--line);padding:1px 0 1px 10px;margin:7px 0;font-size:13px;overflow-wrap:anywhere}
.hit.rel{border-color:var(--ok)}
"""

SCRIPT = r"""
"use strict";
const WHY = [
  d => "outranked: it came at rank " + d, d => "beyond the token budget: it came at rank " + d,
  () => "shares no term with the query", () => "nothing to index: it has no words",
  d => "shares " + d + (d === 1 ? " term" : " terms") + " with the query, but is not among the first hits asked for",
  () => "the query failed"];
function make(tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}
function option(select, value, text) {
  const node = make("option", text);
  node.value = value;
  select.append(node);
}
function view(root, data) {
  const run = make("select"), other = make("select"), show = make("select"), find = make("input");
  data.runs.forEach((name, i) => { option(run, i, name); option(other, i, "beside: " + name); });
  option(other, -1, "beside: none");
  other.value = -1;
  [["all", "all queries"], ["missed", "something missed"], ["none", "nothing found in the first " + data.shown],
   ["failed", "failed"]].forEach(([v, t]) => option(show, v, t));
  const categories = [...new Set(data.queries.map(q => q.c))].filter(c => c).sort();
  categories.forEach(c => option(show, "=" + c, "category: " + c));
  find.placeholder = "words in the query";
  [[run, "Configuration"], [other, "Second configuration"], [show, "Which queries"], [find, "Words in the query"]]
    .forEach(([node, label]) => node.setAttribute("aria-label", label));
  const bar = make("div", undefined, "bar"), count = make("span", "", "dim"), grid = make("div", undefined, "drill");
  bar.append(run, other, show, find, count);
  const list = make("div", undefined, "list"), detail = make("div");
  grid.append(list, detail);
  root.replaceChildren(bar, grid);
  let chosen = 0;
  const score = (q, i) => q.s[i] === null ? "–" : q.s[i].toFixed(2);
  function passes(q) {
    const got = q.g[run.value], want = show.value;
    if (find.value && !q.t.toLowerCase().includes(find.value.toLowerCase())) return false;
    if (want === "missed") return got.n > 0;
    if (want === "none") return q.s[run.value] === 0;
    if (want === "failed") return got.e !== "";
    return want[0] === "=" ? q.c === want.slice(1) : true;
  }
  function column(q, i) {
    const box = make("div"), got = q.g[i], grades = new Map(q.r);
    box.append(make("h3", data.runs[i] + ", nDCG@10 " + score(q, i)));
    if (got.e) box.append(make("p", got.e, "bad"));
    got.h.forEach(([doc, value], at) => {
      const grade = grades.get(doc) || 0, good = grade >= data.from;
      const hit = make("div", undefined, good ? "hit rel" : "hit");
      const head = make("div", (at + 1) + ". " + data.docs[doc][0] + ", score " + value, good ? "good" : "dim");
      if (grade) head.append((good ? " · relevant, grade " : " · not counted as relevant, grade ") + grade);
      hit.append(head, make("div", data.docs[doc][1]));
      box.append(hit);
    });
    if (!got.h.length && !got.e) box.append(make("p", "Nothing came back."));
    if (got.n) box.append(make("p", "Relevant, and not among these " + got.h.length + ":"));
    got.m.forEach(([doc, why, detail]) => {
      const miss = make("div", undefined, "hit");
      miss.append(make("div", data.docs[doc][0] + ": " + WHY[why](detail), "bad"), make("div", data.docs[doc][1]));
      box.append(miss);
    });
    if (got.n > got.m.length) box.append(make("p", "and " + (got.n - got.m.length) + " more", "dim"));
    return box;
  }
  function draw() {
    const found = data.queries.map((q, at) => [q, at]).filter(([q]) => passes(q));
    count.textContent = found.length + " of " + data.queries.length + " queries";
    if (!found.some(([, at]) => at === chosen)) chosen = found.length ? found[0][1] : -1;
    list.replaceChildren(...found.map(([q, at]) => {
      const line = make("button", score(q, run.value) + "  " + q.t);
      line.setAttribute("aria-current", at === chosen);
      line.onclick = () => { chosen = at; draw(); };
      return line;
    }));
    const q = data.queries[chosen];
    if (!q) { detail.replaceChildren(make("p", "No query is left.")); return; }
    const asked = make("p", q.t, "base");
    const relevant = q.r.filter(([, grade]) => grade >= data.from).length;
    const facts = make("p", q.id + (q.c ? " · " + q.c : "") + " · " + relevant + " relevant", "dim");
    detail.replaceChildren(asked, facts, column(q, run.value));
    if (other.value >= 0) detail.append(column(q, other.value));
  }
  [run, other, show].forEach(node => node.onchange = draw);
  find.oninput = draw;
  draw();
}
document.querySelectorAll("script[type='application/json'][data-view]").forEach(node =>
  view(document.getElementById(node.dataset.view), JSON.parse(node.textContent)));
"""
