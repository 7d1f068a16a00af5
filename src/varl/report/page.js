"use strict";
/* Draws the page from the JSON in #data. Text only ever becomes a text node. */
const root = document.documentElement;
window.onerror = (message, file, line) => { root.dataset.error = `${message} (line ${line})`; };
window.onunhandledrejection = (event) => { root.dataset.error = String(event.reason); };
const run = JSON.parse(document.getElementById("data").textContent);

/* ---- small tools ---- */
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const refill = (node, ...children) => { node.replaceChildren(); return fill(node, {}, children); };
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const words = (name) => name.replaceAll("_", " ");
const sum = (list) => list.reduce((a, b) => a + b, 0);

function format(value) {
  if (!isNumber(value)) return value === null || value === undefined ? "–" : String(value);
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (Number.isInteger(value) && size < 1e6) return value.toLocaleString("en").replaceAll(",", "\u202f").replace("-", "−");
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace(".0e", "e").replace("e+", "e").replaceAll("-", "−");
  return String(Number(value.toPrecision(3))).replace("-", "−");
}
/* Numbers that are compared down a column keep their zeros. */
function formatEven(value) {
  const size = Math.abs(value);
  if (!isNumber(value) || Number.isInteger(value) || size < .001 || size >= 100) return format(value);
  return (size < 1 ? value.toFixed(3) : value.toPrecision(3)).replace("-", "−");
}
const signed = (value, digits = 3) => (isNumber(value) ? (value > 0 ? "+" : "") + format(Number(value.toPrecision(digits))) : "–");
/* Text with `commands` in it. */
const prose = (text) => text.split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part));
const isShare = (name) => /accuracy|share|rate$|exact|occupancy|fraction/.test(name);
function formatAs(name, value, plain = format) {
  return isShare(name) && isNumber(value) && Math.abs(value) <= 1 ? `${(100 * value).toFixed(1).replace("-", "−")} %` : plain(value);
}
const formatInterval = (name, interval) => `[${interval.map((end) => formatAs(name, end, formatEven).replace(" %", "")).join(", ")}]`;

const sections = [];
function section(id, title, lead, ...children) {
  sections.push([id, title]);
  return h("section", { id }, h("h2", {}, title), lead && h("p", {}, prose(lead)), ...children);
}
const absent = (name) => run.missing[name] && h("div", { class: "absent" }, prose(run.missing[name]));

/* ---- pictures and what was read in them ---- */
/* Whether there is a reader at all: words are wanted, or something was read. Else a picture is right or wrong, or nobody said. */
const film = run.film;
const shots = [...(film?.frames || []).flat(), ...(run.gallery?.items || []).flatMap(({ before, after }) => [before, after])];
const reads = shots.some((shot) => shot.found?.length) || (film?.prompts || []).some((prompt) => prompt.words?.length);
const hasBoxes = shots.some((shot) => shot.found?.some((found) => found.box));
const hasDraws = shots.some((shot) => shot.draws);
const hasOrder = (film?.prompts || []).some((prompt) => prompt.order?.length);
const letters = (text) => text.toUpperCase().replace(/\s+/g, " ").trim();
const isRight = (found, wanted) => letters(found.text).split(" ").every((word) => wanted.some((want) => letters(want) === word));

function boxes(found, wanted) {
  const rects = found.filter((f) => f.box).flatMap((f) => {
    const [x0, y0, x1, y1] = f.box.map((end) => 100 * end);
    const place = { x: x0, y: y0, width: Math.max(0, x1 - x0), height: Math.max(0, y1 - y0) };
    const title = () => s("title", {}, `${f.text} · confidence ${format(f.confidence)}`);
    return [s("rect", { ...place, class: "box halo" }), s("rect", { ...place, class: `box line ${isRight(f, wanted) ? "" : "wrong"}` }, title())];
  });
  return s("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" }, rects);
}
function picture(uri, alt, overlay) {
  if (!uri) return h("div", { class: "picture" }, h("span", { class: "none" }, "no picture"));
  const image = h("img", { src: uri, alt, onload: (event) => event.target.classList.toggle("smooth", event.target.naturalWidth > 100) });
  return h("div", { class: "picture" }, image, overlay);
}

/* The longest common subsequence marks which letters of `got` are wanted; the others are underlined, and lacking ones shown as a dot. */
function spell(got, wanted) {
  const a = [...got], b = [...letters(wanted)], same = (i, j) => letters(a[i]) === b[j] || a[i] === b[j];
  const length = Array.from({ length: a.length + 1 }, () => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    length[i][j] = same(i, j) ? 1 + length[i + 1][j + 1] : Math.max(length[i + 1][j], length[i][j + 1]);
  const out = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && same(i, j)) { out.push(a[i]); i++; j++; }
    else if (i < a.length && (j === b.length || length[i + 1][j] >= length[i][j + 1])) out.push(h("span", { class: "off" }, a[i++]));
    else { out.push(h("span", { class: "lack", title: `${b[j]} is lacking` }, "·")); j++; }
  }
  return out;
}
function reading(found, wanted, correct) {
  if (!reads && typeof correct !== "boolean") return null;
  const text = found.map((f) => f.text).join(" ");
  const right = correct ?? (letters(text) === letters(wanted.join(" ")));
  const mark = h("span", { class: `mark ${right ? "good" : "bad"}`, role: "img", "aria-label": right ? "correct" : "wrong" }, right ? "✓" : "✗");
  if (!reads) return h("div", { class: "read" }, mark, h("span", { class: "soft" }, right ? "recognised" : "not recognised"));
  return h("div", { class: "read" }, mark, text ? (right ? text : spell(text, wanted.join(" "))) : h("span", { class: "soft" }, "nothing read"));
}

/* ---- header ---- */
function facts(entries) {
  return h("dl", { class: "facts" }, Object.entries(entries).map(([name, value]) => [h("dt", {}, words(name)), h("dd", {}, cell(name, value))]));
}
const LONG = { fd: "Fréchet distance" };
function headline({ metric, lower_is_better: lower, before, after, source }) {
  const gain = after.value - before.value;
  const relative = lower && before.value > 0 ? ` · ${signed(Math.round(100 * gain / before.value))} %` : "";
  const delta = isShare(metric) ? `${(100 * gain).toFixed(1)} points` : format(gain) + relative;
  const ends = h("div", { class: "ends" },
    h("span", { class: "value old" }, formatAs(metric, before.value)), h("span", { class: "arrow" }, "→"),
    h("span", { class: "value" }, formatAs(metric, after.value)),
    h("span", { class: `badge ${(lower ? gain <= 0 : gain >= 0) ? "good" : "bad"}` }, (gain > 0 ? "+" : "") + delta.replace("-", "−")));
  const intervals = before.interval && after.interval;
  const says = intervals ? `${source}; before ${formatInterval(metric, before.interval)}, after ${formatInterval(metric, after.interval)}${isShare(metric) ? " %" : ""}` : source;
  return h("div", { class: "card result" }, h("div", {}, h("div", { class: "eyebrow" }, (LONG[metric] || words(metric)) + (lower ? ", lower is better" : "")), ends), intervals && versus(metric, before, after),
    h("p", { class: "small soft num" }, says));
}
/* Before and after as dots with whiskers on one axis: from 0 to 1 if that holds them, else from 0 to round numbers. */
function versus(metric, before, after) {
  const ends = [before, after].flatMap((m) => [m.value, ...m.interval]);
  const span = ends.every((end) => end >= 0 && end <= 1) ? [0, 1] : [Math.min(0, ...ends), Math.max(0, ...ends)];
  const [first, second] = ticks(...span, 4), step = second - first;
  const low = step * Math.floor(span[0] / step), high = step * Math.ceil(span[1] / step), x = (value) => 6 + 388 * (value - low) / (high - low);
  const whisker = (m, y, colour) => [
    s("line", { x1: x(m.interval[0]), x2: x(m.interval[1]), y1: y, y2: y, stroke: colour, "stroke-width": 2.5, "stroke-linecap": "round" }),
    s("circle", { cx: x(m.value), cy: y, r: 4.5, fill: colour })];
  return s("svg", { class: "versus", viewBox: "0 0 400 44", role: "img", "aria-label": "before and after with their intervals" },
    s("line", { x1: 6, x2: 394, y1: 30, y2: 30, stroke: "var(--line)" }),
    ticks(low, high, 4).map((t) => s("line", { x1: x(t), x2: x(t), y1: 27, y2: 30, stroke: "var(--line)" })),
    [low, high].map((t) => s("text", { x: x(t), y: 42, "text-anchor": t === high ? "end" : "start" }, formatAs(metric, t).replace(".0", ""))),
    whisker(before, 9, "var(--soft)"), whisker(after, 20, "var(--accent)"));
}
function command() {
  if (!run.command) return absent("command");
  const code = h("code", {}, run.command);
  const copy = h("button", { onclick: async () => {
    if (!navigator.clipboard) return getSelection().selectAllChildren(code);  // a page that came over plain http has no clipboard
    await navigator.clipboard.writeText(run.command);
    copy.textContent = "copied";
    return setTimeout(() => { copy.textContent = "copy"; }, 1500);
  } }, "copy");
  return h("div", { class: "card command" }, code, copy);
}
function header() {
  return h("header", {}, h("div", { class: "eyebrow" }, "VARL · report of a run"), h("h1", {}, run.title),
    h("div", { class: "hero" }, run.headline ? headline(run.headline) : h("div", { class: "card result soft" }, "Nothing measured yet."),
      h("div", { class: "card result" }, facts(run.header))), command());
}

/* ---- before and after ---- */
function galleryCard({ text, style, before, after }) {
  const wanted = text.split("|").join(" ").split(/\s+/).filter(Boolean);
  const side = (name, part) => h("figure", {}, h("figcaption", {}, name),
    picture(part.picture, `${text}, ${name} training`, boxes(part.found || [], wanted)), reading(part.found || [], wanted, part.correct));
  return h("article", { class: "card" }, h("div", { class: "row spread" }, h("span", { class: "want" }, text), h("span", { class: "small soft" }, (style || []).join(" · "))),
    h("div", { class: "pair" }, side("before", before), side("after", after)));
}
function gallery() {
  if (!run.gallery) return section("gallery", "Before and after", null, absent("gallery"));
  const judged = run.gallery.items.some(({ after }) => typeof after.correct === "boolean");
  const outcome = ({ before, after }) => (after.correct ? (before.correct ? "right in both" : "fixed") : (before.correct ? "broken" : "wrong in both"));
  const cards = run.gallery.items.map((item) => [outcome(item), galleryCard(item)]);
  const tiles = h("div", { class: "tiles" }, cards.map(([, card]) => card));
  const chips = (judged ? ["all", "fixed", "broken", "right in both", "wrong in both"] : []).map((name) => {
    const count = name === "all" ? cards.length : cards.filter(([kind]) => kind === name).length;
    return h("button", { "aria-pressed": String(name === "all"), onclick: () => {
      for (const chip of chips) chip.setAttribute("aria-pressed", String(chip === chips.find((c) => c.dataset.name === name)));
      for (const [kind, card] of cards) card.hidden = name !== "all" && kind !== name;
    }, "data-name": name }, `${name} ${count}`);
  });
  const toggle = hasBoxes && h("button", { "aria-pressed": "true", onclick: () => toggle.setAttribute("aria-pressed", String(!tiles.classList.toggle("boxless"))) }, "reader's boxes");
  const more = run.gallery.left_out ? ` ${run.gallery.left_out} further pairs are left out to keep the page small.` : "";
  const judge = reads ? " Boxes and words are what the reader saw." : judged ? " Recognised: the judge takes it for what was asked." : "";
  return section("gallery", "Before and after", `The same prompts and seeds, drawn by the model before and after training.${judge}${more}`,
    h("div", { class: "row spread" }, h("div", { class: "row" }, chips), toggle), tiles);
}

/* ---- training, step by step ---- */
const view = { step: 0, prompt: 0, draw: 0, listeners: [] };
function show(step, prompt, keep) {
  view.step = clamp(step, 0, film.steps.length - 1);
  view.prompt = clamp(prompt, 0, film.prompts.length - 1);
  root.dataset.step = film.steps[view.step];
  root.dataset.prompt = view.prompt;
  if (!keep) history.replaceState(null, "", `#step=${film.steps[view.step]}&prompt=${view.prompt}`);
  for (const listener of view.listeners) listener(film.frames[view.step][view.prompt], film.prompts[view.prompt]);
}
/* #step=20&prompt=3: the latest step drawn at or before 20, and prompt 3. */
function followLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (!link.has("step") && !link.has("prompt")) return false;
  const at = film.steps.filter((step) => step <= Number(link.get("step"))).length - 1;
  show(link.has("step") ? Math.max(0, at) : film.steps.length - 1, Math.round(Number(link.get("prompt"))) || 0, true);
  return true;
}
const nameOf = (prompt) => prompt.text || `picture ${film.prompts.indexOf(prompt) + 1}`;
const wantedOf = (prompt) => (prompt.words && prompt.words.length ? prompt.words : prompt.text.split(/\s+/));

function player() {
  let timer = null;
  const slider = h("input", { type: "range", min: 0, max: film.steps.length - 1, step: 1, "aria-label": "training step", oninput: () => show(Number(slider.value), view.prompt) });
  const label = h("output", {});
  const play = h("button", { class: "play", onclick: () => (timer ? stop() : start()) }, "▶ play");
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶ play"; };
  const start = () => {
    if (view.step === film.steps.length - 1) show(0, view.prompt);
    play.textContent = "❚❚ pause";
    timer = setInterval(() => (view.step < film.steps.length - 1 ? show(view.step + 1, view.prompt) : stop()), 350);
  };
  view.listeners.push(() => { slider.value = view.step; label.textContent = `step ${film.steps[view.step]}`; slider.setAttribute("aria-valuetext", label.textContent); });
  window.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || event.altKey || event.ctrlKey || event.metaKey || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
    event.preventDefault();
    show(view.step + move, view.prompt);
  });
  return h("div", { class: "card player" }, play, slider, label);
}
function wall() {
  const buttons = film.prompts.map((prompt, number) => h("button", { onclick: () => show(view.step, number), title: nameOf(prompt) }));
  view.listeners.push(() => buttons.forEach((button, number) => {
    const shot = film.frames[view.step][number];
    button.setAttribute("aria-pressed", String(number === view.prompt));
    const name = nameOf(film.prompts[number]);
    button.replaceChildren(picture(shot.picture, name),
      h("div", { class: "name" }, h("span", {}, name), h("span", { class: "soft num" }, format(shot.reward))));
  }));
  return h("div", { class: "card fixed" }, buttons);
}
function detail() {
  const box = h("div", { class: "card", id: "shot" });
  view.listeners.push((shot, prompt) => {
    const wanted = wantedOf(prompt), name = nameOf(prompt);
    refill(box,
      h("div", { class: "row spread" }, h("span", { class: "want" }, name), h("span", { class: "small soft" }, (prompt.style || []).join(" · "))),
      shot.draws ? redrawn(shot, prompt) : [
        h("div", { style: { margin: "9px 0 8px" } }, picture(shot.picture, `${name} at step ${film.steps[view.step]}`, boxes(shot.found, wanted))),
        h("div", { class: "row spread" }, reading(shot.found, wanted), h("span", { class: "num" }, h("span", { class: "soft" }, "reward "), h("b", {}, format(shot.reward))))],
      rewardLine());
  });
  return box;
}
/* A real picture, the chosen one of its draws beside it, and all draws to choose from. */
const chosen = (shot) => clamp(view.draw, 0, shot.draws.length - 1);
const drawName = ({ number, mark }) => `draw ${number + 1}${mark ? `, ${mark}` : ""}`;
function choose(draw, button) {
  view.draw = draw;
  show(view.step, view.prompt, true);
  document.getElementById(button).focus({ preventScroll: true });
}
function redrawn(shot, prompt) {
  const at = chosen(shot), draw = shot.draws[at];
  const less = shot.draws_left_out ? `${shot.draws_left_out} more are left out; the best and the worst are here. ` : "";
  return [
    h("div", { class: "pair" }, h("figure", {}, h("figcaption", {}, "real"), picture(prompt.real, `${nameOf(prompt)}, the real picture`)),
      h("figure", {}, h("figcaption", {}, drawName(draw)), picture(draw.picture, `${drawName(draw)} at step ${film.steps[view.step]}`))),
    h("div", { class: "draws" }, shot.draws.map((each, i) => h("button", { id: `draw-${i}`, "aria-pressed": String(i === at), title: drawName(each), onclick: () => choose(i, `draw-${i}`) },
      picture(each.picture, drawName(each)),
      ends(isNumber(each.reward) ? h("b", {}, formatEven(each.reward)) : "not judged", each.mark && h("b", { class: each.mark === "best" ? "good" : "bad" }, each.mark)),
      Object.entries(each.parts).map(([name, value]) => ends(h("span", { class: "soft" }, words(name)), formatEven(value))),
      ends(h("span", { class: "soft" }, "advantage"), h("span", { style: { color: pushColour(each.advantage) } }, signed(each.advantage, 2)))))),
    h("div", { class: "small soft num" }, `${less}Mean reward of all draws ${format(shot.draws_reward)}; below, at every step.`)];
}
const ends = (left, right) => h("div", { class: "line num" }, h("span", {}, left), right);
const pushColour = (value) => (value > 0 ? "var(--plus)" : "var(--minus)");
const rewardOf = (shot) => (shot.draws ? shot.draws_reward : shot.reward);
/* This prompt's reward at every drawn step, with the present one marked. */
function rewardLine() {
  const values = film.frames.map((frame) => rewardOf(frame[view.prompt])), known = values.filter(isNumber);
  if (known.length < 2) return null;
  const low = Math.min(...known), span = Math.max(...known) - low || 1;
  const x = (i) => 5 + 390 * i / (values.length - 1), y = (value) => 41 - 34 * (value - low) / span;
  const points = values.flatMap((value, i) => (isNumber(value) ? [`${x(i)},${y(value)}`] : []));
  return s("svg", { viewBox: "0 0 400 46", role: "img", "aria-label": "reward of this prompt over training", style: { "margin-top": "8px", width: "100%" } },
    s("line", { x1: x(view.step), x2: x(view.step), y1: 2, y2: 45, class: "cross" }),
    s("polyline", { points: points.join(" "), fill: "none", stroke: "var(--accent)", "stroke-width": 1.5, "stroke-linejoin": "round" }),
    isNumber(values[view.step]) && s("circle", { cx: x(view.step), cy: y(values[view.step]), r: 4, fill: "var(--accent)" }));
}
function strip() {
  const bar = h("div", { class: "strip", "aria-label": "this prompt at every step" });
  let shown = -1;
  view.listeners.push((_, prompt) => {
    if (shown !== view.prompt) bar.replaceChildren(...film.frames.map((frame, i) => h("button", { onclick: () => show(i, view.prompt) },
      picture(frame[view.prompt].picture, `${nameOf(prompt)} at step ${film.steps[i]}`), h("span", { class: "num soft" }, film.steps[i]))));
    shown = view.prompt;
    [...bar.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === view.step)));
    const here = bar.children[view.step];
    bar.scrollLeft = here.offsetLeft - bar.offsetLeft - bar.clientWidth / 2 + here.clientWidth / 2;
  });
  return bar;
}
function training() {
  if (!film) return section("film", "Training, step by step", null, absent("film"));
  const less = film.left_out ? ` ${film.left_out} of ${film.left_out + film.steps.length} steps are left out to keep the page small.` : "";
  const what = hasDraws ? "Fixed real pictures, drawn again with every token in the context of the real ones before it: here the first draw and its reward, beside it all draws of the chosen picture. Seeds are fixed too"
    : "Fixed prompts, each with its own fixed seed";
  return section("film", "Training, step by step", `${what}, so only the weights change. Drag the slider, or use the ← and → keys.${less}`,
    player(), h("div", { class: "stage" }, wall(), detail()), strip());
}

/* ---- the order in which a masked model settled its tokens ---- */
function veil([rows, columns], order, known) {
  const cell = (i, more) => s("rect", { x: 100 * (i % columns) / columns, y: 100 * Math.floor(i / columns) / rows, width: 100 / columns, height: 100 / rows, ...more });
  const of = (wanted, more) => order.flatMap((step, i) => (wanted(step) ? [cell(i, more)] : []));
  return s("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
    of((step) => step >= known, { class: "hidden" }), of((step) => step === known - 1, { class: "box halo" }), of((step) => step === known - 1, { class: "box fresh" }));
}
/* How many tokens each drawing step settled; a click on one goes there. */
function stepBars(counts, known, go) {
  const width = 400 / counts.length, most = Math.max(...counts);
  return s("svg", { class: "steps", viewBox: "0 0 400 78", role: "img", "aria-label": "tokens settled at each step" }, counts.map((count, k) => [
    s("rect", { x: k * width + .5, width: Math.max(.5, width - 1), y: 60 - 58 * count / most, height: 58 * count / most, fill: ramp(k, counts.length), opacity: k < known ? 1 : .25 }),
    s("rect", { x: k * width, width, y: 0, height: 62, fill: "transparent", onclick: () => go(k + 1) }, s("title", {}, `step ${k + 1}: ${count} token${count === 1 ? "" : "s"}`))]),
    s("text", { x: 0, y: 75 }, "step 1"), s("text", { x: 400, y: 75, "text-anchor": "end" }, `step ${counts.length}`));
}
function drawOrder() {
  if (!hasOrder) return null;
  const grid = film.grids[0], steps = 1 + Math.max(...film.prompts.flatMap((prompt) => prompt.order));
  let known = Math.ceil(2 * steps / 3), timer = null;
  const veiled = h("div", {}), maps = h("div", { class: "card tight" }), label = h("output", { class: "num small" });
  const slider = h("input", { type: "range", min: 0, max: steps, step: 1, "aria-label": "drawing step", style: { flex: 1, "min-width": "90px" }, oninput: () => go(Number(slider.value)) });
  const draw = () => {
    const prompt = film.prompts[view.prompt], { picture: uri } = film.frames[view.step][view.prompt], { order } = prompt;
    if (!order?.length) { refill(maps); return refill(veiled, h("div", { class: "absent" }, "No order was recorded for this picture.")); }
    const counts = Array.from({ length: steps }, (_, k) => order.filter((step) => step === k).length);
    slider.value = known;
    label.textContent = `step ${known} of ${steps} · ${order.filter((step) => step < known).length} of ${order.length} tokens`;
    slider.setAttribute("aria-valuetext", label.textContent);
    refill(veiled, picture(uri, `${nameOf(prompt)}, its tokens settled by step ${known}`, veil(grid, order, known)));
    return refill(maps, heat(uri, grid, order.map((step) => step + 1), 1, (step) => ramp(step - 1, steps)), h("h3", {}, "tokens settled at each step"), stepBars(counts, known, go));
  };
  const go = (step) => { known = step; draw(); };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶ draw"; };
  const play = h("button", { class: "play", onclick: () => {
    if (timer) return stop();
    if (known === steps) go(0);
    play.textContent = "❚❚ pause";
    timer = setInterval(() => (known < steps ? go(known + 1) : stop()), clamp(4000 / steps, 60, 400));
    return null;
  } }, "▶ draw");
  view.listeners.push(draw);
  return section("order", "In which order it was drawn", "A masked model settles a few tokens at a time, in an order that is drawn for each picture and does not depend on the weights. Of the finished picture of the prompt chosen above, what is not settled yet is covered, and what the step settled is outlined (the decoder blends neighbouring cells). The map says which step settled each token, first (light) to last (dark).",
    h("div", { class: "stage" }, h("div", { class: "card tight" }, veiled, h("div", { class: "row" }, play, slider, label)), maps));
}

/* ---- credit ---- */
function weightsOf(shot) {
  return film.grids.map(([rows, columns], k) => Array.from({ length: rows * columns }, (_, i) => film.panw_weights[k] * (shot.mask.length ? Number(shot.mask[k][i]) : 1)));
}
function heat(uri, [rows, columns], values, top, colour) {
  const cells = values.map((value, i) => value === 0 ? null : s("rect", {
    x: 100 * (i % columns) / columns, y: 100 * Math.floor(i / columns) / rows, width: 100 / columns, height: 100 / rows,
    fill: colour(value), "fill-opacity": (0.74 * Math.min(1, Math.abs(value) / (top || 1))).toFixed(3) }, s("title", {}, format(value))));
  const grid = [];
  for (let i = 1; i < columns; i++) grid.push(s("line", { x1: 100 * i / columns, x2: 100 * i / columns, y1: 0, y2: 100 }));
  for (let i = 1; i < rows; i++) grid.push(s("line", { y1: 100 * i / rows, y2: 100 * i / rows, x1: 0, x2: 100 }));
  const lines = s("g", { stroke: "var(--soft)", "stroke-opacity": .35, "stroke-width": .6 }, grid);
  for (const line of grid) line.setAttribute("vector-effect", "non-scaling-stroke");
  const view = s("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": `${rows} by ${columns} tokens` }, cells, lines);
  const box = picture(uri, "", view);
  box.classList.add("heat");
  return box;
}
function panwBars() {
  const top = Math.max(...film.panw_weights);
  const bars = film.grids.map(([rows, columns], k) => h("div", { class: "bar", title: `${rows} × ${columns} tokens, weight ${format(film.panw_weights[k])}` },
    format(film.panw_weights[k]), h("i", { style: { height: `${58 * film.panw_weights[k] / top}%` } }), `${rows}×${columns}`));
  if (isNumber(film.middle_step) && film.middle_step < bars.length) bars.splice(film.middle_step, 0, h("div", { class: "end" }, h("span", {}, "prefix ends")));
  return h("div", { class: "card" }, h("h3", {}, "PANW weight of one token, scale by scale"),
    h("p", { class: "small soft" }, isNumber(film.panw_alpha) ? `(h w)^−${film.panw_alpha}: coarse tokens decide more of the picture and gain weight.` : ""), h("div", { class: "panw" }, bars));
}
/* Of one grid whose tokens all have the same weight and advantage there is nothing to see. */
const isFlat = (row) => row.every((value) => value === row[0]);
const saysNothing = () => film.grids.length === 1 && film.frames.flat().every((shot) => isFlat([...(shot.mask[0] || "")]) && isFlat(shot.advantage[0] || []));

/* The mean squared difference of two pictures in each cell of a grid, of pixels in [-1, 1]: if none was shrunk, their mean is the reward's mse. */
async function squaredError(real, drawn, [rows, columns]) {
  if (!real || !drawn) return new Array(rows * columns).fill(0);
  const [a, b] = await Promise.all([real, drawn].map(async (uri) => { const image = new Image(); image.src = uri; await image.decode(); return image; }));
  const width = b.naturalWidth, height = b.naturalHeight;
  const [p, q] = [a, b].map((image) => {
    const pen = h("canvas", { width, height }).getContext("2d", { willReadFrequently: true });
    pen.drawImage(image, 0, 0, width, height);
    return pen.getImageData(0, 0, width, height).data;
  });
  const total = new Array(rows * columns).fill(0), count = [...total];
  for (let i = 0; i < width * height; i++) {
    const at = Math.floor(Math.floor(i / width) * rows / height) * columns + Math.floor(i % width * columns / width);
    for (let c = 4 * i; c < 4 * i + 3; c++) { total[at] += 4 * ((p[c] - q[c]) / 255) ** 2; count[at]++; }
  }
  return total.map((value, at) => value / count[at]);
}
function drawCredit() {
  const grid = film.grids.at(-1), maps = h("div", { class: "scales maps" }), picks = h("div", { class: "row" });
  let turn = 0;
  view.listeners.push(async (shot, prompt) => {
    const mine = ++turn;
    if (!shot.draws) { refill(picks); return refill(maps, h("div", { class: "absent" }, "No draws were recorded for this picture.")); }
    const at = chosen(shot), draw = shot.draws[at], weight = weightsOf(shot).at(-1);
    refill(picks, h("span", { class: "small soft" }, `${nameOf(prompt)}, step ${film.steps[view.step]}, draw`), shot.draws.map((each, i) => h("button", {
      id: `pick-${i}`, "aria-pressed": String(i === at), title: drawName(each), onclick: () => choose(i, `pick-${i}`) }, `${each.number + 1}${each.mark ? ` ${each.mark}` : ""}`)));
    const errors = await Promise.all(shot.draws.map((each) => squaredError(prompt.real, each.picture, grid)));
    if (mine !== turn) return null;
    const card = (title, says, shown) => h("div", { class: "card scale" }, h("h3", {}, title), shown, h("div", { class: "small soft num" }, says));
    const topPush = Math.max(...weight) * Math.max(...shot.draws.map((each) => Math.abs(each.advantage)));
    return refill(maps,
      card("real", nameOf(prompt), picture(prompt.real, "the real picture")),
      card(drawName(draw), `reward ${format(draw.reward)}`, picture(draw.picture, drawName(draw))),
      card("difference", `squared: mean ${format(sum(errors[at]) / errors[at].length)}, most ${format(Math.max(...errors[at]))}`, heat(draw.picture, grid, errors[at], Math.max(...errors.flat()), () => "var(--weight)")),
      card("push", `advantage ${signed(draw.advantage)}`, heat(draw.picture, grid, weight.map((w) => w * draw.advantage), topPush, pushColour)));
  });
  const key = h("div", { class: "small soft row" }, h("span", {}, "less likely", h("span", { class: "key push" }), "more likely"), h("span", {}, "as the real one", h("span", { class: "key weight" }), "far from it"));
  return section("credit", "Who got the credit", "Where a draw differs from the real picture, token by token (of the pictures as shown, pixels in [−1, 1]), and how hard the update pushed its tokens. A draw has one advantage, so what is right in it is pushed as hard as what is wrong. Colours are comparable between the draws of a picture.",
    h("div", { class: "row spread" }, picks, key), maps);
}
/* Of a masked model: how far further paths of each token differ, what it weighs, and how hard it was pushed. */
function maskedCredit() {
  const every = film.frames.flat().filter((shot) => shot.weight);
  if (every.every((shot) => !shot.spread && isFlat(shot.weight))) return null;
  const maps = h("div", { class: "scales maps" }), note = h("p", { class: "small soft" }), grid = film.grids[0];
  const card = (title, says, shown) => h("div", { class: "card scale" }, h("h3", {}, title), shown, h("div", { class: "small soft num" }, says));
  const most = (name) => Math.max(...film.frames.flatMap((frame) => frame[view.prompt][name] || [0]));
  view.listeners.push((shot, prompt) => {
    const then = isNumber(shot.at) ? ` Learned from as it stood before drawing step ${shot.at + 1}.` : "";
    note.textContent = `${nameOf(prompt)}, step ${film.steps[view.step]}.${then}`;
    if (!shot.weight) return refill(maps, h("div", { class: "absent" }, "No weights were recorded for this picture."));
    const { weight, spread } = shot, learns = weight.filter((value) => value > 0), advantage = shot.advantage[0] || [];
    const push = weight.map((value, i) => value * (advantage[i] ?? 0)), topPush = Math.max(...film.frames.flatMap(({ [view.prompt]: each }) => (each.weight || []).map((value, i) => Math.abs(value * (each.advantage[0]?.[i] ?? 0)))));
    const range = learns.length ? `${learns.length} of ${weight.length} tokens learn, at weights ${[...new Set([Math.min(...learns), Math.max(...learns)])].map(format).join(" to ")}` : "no token learns";
    const pushed = advantage.filter((_, i) => weight[i] > 0), ends = [...new Set(pushed.length ? [Math.min(...pushed), Math.max(...pushed)] : [])];
    return refill(maps,
      spread && card("uncertainty", `spread over further paths, unit of the latents: mean ${format(sum(spread) / spread.length)}, most ${format(Math.max(...spread))}`, heat(shot.picture, grid, spread, most("spread"), () => "var(--unsure)")),
      card("what learns", range, heat(shot.picture, grid, weight, most("weight"), () => "var(--weight)")),
      card("push = weight × advantage", ends.length ? `advantage ${ends.map((value) => signed(value)).join(" to ")}` : "none", heat(shot.picture, grid, push, topPush, pushColour)));
  });
  const spreads = every.some((shot) => shot.spread);
  const key = h("div", { class: "small soft row" }, spreads && h("span", {}, "certain", h("span", { class: "key unsure" }), "uncertain"), h("span", {}, "no weight", h("span", { class: "key weight" }), "most"), h("span", {}, "less likely", h("span", { class: "key push" }), "more likely"));
  const uncertain = spreads ? "How far further denoising paths of a token end from one another, what its own path weighs, and how hard the update pushed it" : "What each token's path weighs, and how hard the update pushed it";
  return section("credit", "Who got the credit", `${uncertain}, over the picture itself. Tokens of drawing steps that were not chosen weigh nothing${spreads ? ", uncertain ones less; what these lack their further paths have, where such learn too" : ""}. Colours are comparable between the training steps of a prompt.`,
    h("div", { class: "row spread" }, note, key), maps);
}
function credit() {
  if (!film || !film.panw_weights) return null;
  if (hasDraws) return drawCredit();
  if (hasOrder) return maskedCredit();
  if (saysNothing()) return null;
  const many = film.grids.length > 1, panw = many && film.panw_alpha !== 0;
  const scales = h("div", { class: "scales" }), note = h("p", { class: "small soft" });
  let shared = false;
  const draw = (shot, prompt) => {
    note.textContent = `${nameOf(prompt)}, step ${film.steps[view.step]}.`;
    if (!shot.advantage.length) return scales.replaceChildren(h("div", { class: "absent" }, "No advantages were recorded for this picture."));
    const weight = weightsOf(shot), push = weight.map((row, k) => row.map((w, i) => w * (shot.advantage[k][i] ?? 0)));
    const peak = (row) => Math.max(0, ...row.map(Math.abs)), total = sum(push.flat().map(Math.abs)) || 1;
    const topWeight = Math.max(...weight.map(peak)), topPush = Math.max(...push.map(peak));
    const prefixed = isNumber(film.middle_step);
    scales.replaceChildren(...film.grids.map(([rows, columns], k) => {
      const side = prefixed ? (k < film.middle_step ? "prefix" : "suffix") : "suffix";
      const share = sum(push[k].map(Math.abs)) / total;
      return h("div", { class: `card scale ${side}` },
        h("div", { class: "row spread" }, h("h3", {}, `${rows} × ${columns}`), h("span", { class: "small soft" }, prefixed ? side : "")),
        h("figure", {}, h("figcaption", {}, panw ? "weight = PANW × mask" : "weight = mask"), heat(shot.picture, [rows, columns], weight[k], shared ? topWeight : peak(weight[k]), () => "var(--weight)")),
        h("figure", {}, h("figcaption", {}, "push = weight × advantage"), heat(shot.picture, [rows, columns], push[k], shared ? topPush : peak(push[k]), pushColour)),
        many && h("div", { class: "small soft num" }, `${(100 * share).toFixed(0)} % of all push`));
    }));
    return null;
  };
  view.listeners.push(draw);
  const own = h("button", { "aria-pressed": "false", onclick: () => { shared = !shared; own.setAttribute("aria-pressed", String(shared)); draw(film.frames[view.step][view.prompt], film.prompts[view.prompt]); } }, "one colour range for all scales");
  const key = h("div", { class: "small soft row" }, h("span", {}, "less likely", h("span", { class: "key push" }), "more likely"), h("span", {}, "no weight", h("span", { class: "key weight" }), "most"), many && own);
  return section("credit", "Who got the credit", `Which tokens of the chosen picture the update pushed, ${many ? "scale by scale, " : ""}over the picture itself. It follows the slider and the prompt above.`,
    panw && panwBars(), h("div", { class: "row spread" }, note, key), scales);
}

/* ---- curves ---- */
const WIDE = 460, TALL = 176, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 22;
const charts = [];
let beta = 0.8;

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= rough);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) out.push(Number((i * step).toPrecision(12)));
  return out;
}
/* Exponential moving average, corrected for its start, so that the first value is the first value. */
function smooth(values, decay) {
  let total = 0, norm = 0;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    total = decay * total + (1 - decay) * value;
    norm = decay * norm + (1 - decay);
    return total / norm;
  });
}
/* A chart of series [{name, colour, x, y}] over steps; all charts share the cross-hair. */
function chart(title, series, { says, caption, marks = [] } = {}) {
  const known = series.flatMap((line) => line.y.filter(isNumber)), xs = series.flatMap((line) => line.x);
  let low = Math.min(...known), high = Math.max(...known);
  if (high - low < 1e-12) { const pad = Math.abs(high) * .1 || 1; low -= pad; high += pad; } else { const pad = .06 * (high - low); low -= low >= 0 && low < pad ? low : pad; high += pad; }
  const first = Math.min(...xs), last = Math.max(...xs, first + 1);
  const x = (value) => LEFT + (WIDE - LEFT - RIGHT) * (value - first) / (last - first), y = (value) => TALL - BOTTOM - (TALL - TOP - BOTTOM) * (value - low) / (high - low);
  const path = (line, values) => values.reduce(([d, pen], value, i) => (isNumber(value) ? [`${d}${pen}${x(line.x[i]).toFixed(1)} ${y(value).toFixed(1)}`, "L"] : [d, line.sparse ? pen : "M"]), ["", "M"])[0];
  for (const line of series) line.sparse = line.y.filter(isNumber).length < .5 * line.y.length;
  const lines = s("g", { fill: "none", "stroke-linejoin": "round" }), cross = s("line", { class: "cross", y1: TOP, y2: TALL - BOTTOM, visibility: "hidden" }), dots = s("g", {}), now = h("div", { class: "now" });
  const drawn = series.map(() => []);
  const draw = () => lines.replaceChildren(...series.flatMap((line, i) => {
    drawn[i] = line.sparse ? line.y : smooth(line.y, beta);
    const raw = !line.sparse && beta > 0 && s("path", { d: path(line, line.y), stroke: line.colour, "stroke-width": 1, opacity: series.length > 3 ? .13 : .26 });
    const points = line.sparse ? line.y.flatMap((value, j) => (isNumber(value) ? [s("circle", { cx: x(line.x[j]), cy: y(value), r: 2.6, fill: line.colour, stroke: "none" })] : [])) : [];
    return [raw, s("path", { d: path(line, drawn[i]), stroke: line.colour, "stroke-width": 1.8 }), ...points].filter(Boolean);
  }));
  const point = (step) => {
    cross.setAttribute("visibility", step === null ? "hidden" : "visible");
    const entries = series.map((line, i) => {
      let at = line.x.length - 1;
      if (step !== null) line.x.forEach((value, j) => { if (Math.abs(value - step) < Math.abs(line.x[at] - step)) at = j; });
      while (at > 0 && !isNumber(line.y[at])) at--;
      return { line, at, raw: line.y[at], value: drawn[i][at] };
    });
    if (step !== null) { cross.setAttribute("x1", x(step)); cross.setAttribute("x2", x(step)); }
    dots.replaceChildren(...(step === null ? [] : entries.filter((e) => isNumber(e.value)).map((e) => s("circle", { cx: x(e.line.x[e.at]), cy: y(e.value), r: 3, fill: e.line.colour }))));
    now.replaceChildren(...entries.map(({ line, value, raw }) => h("span", { class: "soft", title: `measured ${format(raw)}` },
      series.length > 1 || line.legend ? [h("span", { class: "swatch", style: { background: line.colour } }), `${line.name} `] : null, h("b", {}, formatAs(line.name, value)))),
      ...(step === null ? [] : [h("span", { class: "soft" }, caption ? caption(step) : `step ${step}`)]));
  };
  const svg = s("svg", { viewBox: `0 0 ${WIDE} ${TALL}`, role: "img", "aria-label": title },
    ticks(low, high, 4).map((t) => [s("line", { class: "gridline", x1: LEFT, x2: WIDE - RIGHT, y1: y(t), y2: y(t) }), s("text", { x: LEFT - 6, y: y(t) + 3.5, "text-anchor": "end" }, format(t))]),
    ticks(first, last, 5).map((t) => s("text", { x: x(t), y: TALL - 6, "text-anchor": "middle" }, format(t))),
    marks.filter((m) => m.step >= first && m.step <= last).map((m) => s("line", { class: "trouble", x1: x(m.step), x2: x(m.step), y1: TOP, y2: TALL - BOTTOM }, s("title", {}, `step ${m.step}: ${m.message}`))),
    lines, cross, dots);
  const steps = [...new Set(xs)].sort((a, b) => a - b);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = first + (last - first) * ((event.clientX - box.left) / box.width * WIDE - LEFT) / (WIDE - LEFT - RIGHT);
    const step = steps.reduce((best, value) => (Math.abs(value - at) < Math.abs(best - at) ? value : best), steps[0]);
    for (const each of charts) each.point(step);
  });
  svg.addEventListener("pointerleave", () => { for (const each of charts) each.point(null); });
  charts.push({ draw, point });
  draw();
  point(null);
  return h("div", { class: "card chart" }, h("h3", { title: says }, title), says && h("p", { class: "says" }, says), now, svg);
}
function smoothing() {
  const label = h("output", { class: "small soft" }, beta.toFixed(2));
  return h("label", { class: "row small soft" }, "smoothing", h("input", { type: "range", min: 0, max: .98, step: .02, value: beta, oninput: (event) => {
    beta = Number(event.target.value);
    label.textContent = beta.toFixed(2);
    for (const each of charts) { each.draw(); each.point(null); }
  } }), label);
}
const colour = (i) => `var(--c${i % 8})`;
const ramp = (i, count) => `color-mix(in oklab, var(--fine) ${Math.round(100 * i / Math.max(1, count - 1))}%, var(--coarse))`;
const ORDER = ["reward", "reward_std", "rewards", "monitor", "eval", "kl", "entropy", "grad_norm", "clip_ratio", "sampling", "mask_occupancy"];
const rank = (name) => (ORDER.indexOf(name) + 1 || ORDER.length + 1);
const ELSEWHERE = ["seconds/", "images_per_second", "entropy/step_", "monitor/"];

/* Metrics that differ only after their last "/" share a chart, as long as it can be read. */
const roomOf = (name) => name.split("/").slice(0, -1).join("/");
const ofSteps = (list) => list.length > 1 && list.every((name) => /\/step_\d+$/.test(name));
function groups(columns) {
  const names = Object.keys(columns).filter((name) => columns[name].some(isNumber) && !ELSEWHERE.some((prefix) => name.startsWith(prefix)));
  const rooms = {};
  for (const name of names) (rooms[roomOf(name) || name] ??= []).push(name);
  return Object.entries(rooms).flatMap(([room, list]) => (list.length <= 6 || ofSteps(list) ? [[list.length > 1 ? room : list[0], list]] : list.map((name) => [name, [name]])))
    .sort((a, b) => rank(a[0].split("/")[0]) - rank(b[0].split("/")[0]));
}
function shortNames(list) {
  return list.length > 1 ? list.map((name) => name.split("/").pop()) : list;
}
const troubles = () => run.events.filter((event) => isNumber(event.step) && /warn|error|stop|alarm|refus|fail|replac/i.test(event.kind || ""));
function caption(step) {
  const at = run.metrics.steps.indexOf(step), stage = run.metrics.columns.stage?.[at];
  return `step ${step}${stage && stage !== "all" ? ` · ${stage}` : ""}`;
}
function metricChart(title, list, colourOf = colour) {
  const { steps, columns, definitions } = run.metrics, short = shortNames(list);
  const texts = [...new Set(list.map((name) => definitions[name]).filter(Boolean))];
  const says = list.length === 1 || texts.length === 1 ? texts[0] : list.map((name, i) => definitions[name] && `${short[i]}: ${definitions[name]}`).filter(Boolean).join(" · ");
  return chart(title, list.map((name, i) => ({ name: short[i], colour: colourOf(i, list.length), x: steps, y: columns[name] })), { says, caption, marks: troubles() });
}
function curves() {
  if (!run.metrics) return section("curves", "Curves", null, absent("metrics"));
  const { every, torn, columns } = run.metrics;
  beta = run.metrics.steps.length > 30 ? .8 : .4;
  const notes = [every > 1 && `Each point is the mean of ${every} steps.`, torn > 0 && `${torn} torn line${torn > 1 ? "s" : ""} of metrics.jsonl skipped.`].filter(Boolean).join(" ");
  const marked = troubles().length ? " Dashed red: a warning or a restart." : "";
  return section("curves", "Curves", `Strong: moving average. Faint: as measured.${marked} ${notes}`,
    h("div", { class: "row spread" }, h("span", {}), smoothing()), h("div", { class: "charts" }, groups(columns).map(([title, list]) => metricChart(title, list, ofSteps(list) ? ramp : colour))));
}
/* ---- what no reward pays for ---- */
function monitor() {
  const list = Object.keys(run.metrics?.columns || {}).filter((name) => name.startsWith("monitor/") && name !== "monitor/alarm" && run.metrics.columns[name].some(isNumber));
  if (!list.length) return null;
  const alarms = run.events.filter((event) => event.kind === "alarm");
  return section("monitor", "What no reward pays for", "Measured beside the reward and never learned from. An alarm is a window of steps in which the reward rose while one of these fell.",
    alarms.length ? h("div", { class: "card warn" }, h("ul", { class: "advice" }, alarms.map((event) => h("li", {}, event.message)))) : h("div", { class: "card" }, "No alarm."),
    h("div", { class: "charts" }, list.map((name) => metricChart(name, [name]))));
}
const stepName = hasOrder ? "drawing step" : "scale";
function entropy() {
  const list = Object.keys(run.metrics?.columns || {}).filter((name) => name.startsWith("entropy/step_")).sort((a, b) => Number(a.split("_").pop()) - Number(b.split("_").pop()));
  if (!list.length) return null;
  const lines = metricChart(`entropy per ${stepName}, nats`, list, ramp);
  const says = hasOrder ? "first (light) to last (dark). It is that of densities and may be negative; what counts is how it moves." : "coarse (light) to fine (dark). A scale that falls to 0 has stopped exploring.";
  return section("entropy", `Entropy per ${stepName}`, `How undecided the model is at each step of drawing, ${says}`,
    h("div", { class: "charts", style: { "grid-template-columns": "repeat(auto-fill, minmax(min(100%, 460px), 1fr))" } }, lines, entropyMap(list)));
}
function entropyMap(list) {
  const { steps, columns } = run.metrics, blocks = Math.min(60, steps.length), known = list.flatMap((name) => columns[name].filter(isNumber)), top = Math.max(...known), low = Math.min(0, ...known);
  const rowHeight = 150 / list.length;
  const cells = list.flatMap((name, k) => Array.from({ length: blocks }, (_, b) => {
    const span = columns[name].slice(Math.floor(b * steps.length / blocks), Math.floor((b + 1) * steps.length / blocks)).filter(isNumber);
    const mean = sum(span) / span.length;
    return span.length ? s("rect", { x: LEFT + (WIDE - LEFT - RIGHT) * b / blocks, y: TOP + k * rowHeight, width: (WIDE - LEFT - RIGHT) / blocks + .3, height: rowHeight - 1.5, fill: "var(--weight)", "fill-opacity": (.05 + .95 * (mean - low) / (top - low || 1)).toFixed(3) },
      s("title", {}, `${stepName} ${k}, around step ${steps[Math.floor(b * steps.length / blocks)]}: ${format(mean)} nats`)) : null;
  }));
  const labels = list.map((name, k) => s("text", { x: LEFT - 6, y: TOP + (k + .5) * rowHeight + 3, "text-anchor": "end" }, film?.grids?.[k] && film.grids.length === list.length ? film.grids[k].join("×") : name.split("_").pop()));
  return h("div", { class: "card chart" }, h("h3", {}, "the same as a map"), h("p", { class: "says" }, `Rows are ${stepName}s, time runs to the right; full colour is ${format(top)} nats${low < 0 ? `, none ${format(low)}` : ""}.`),
    s("svg", { viewBox: `0 0 ${WIDE} ${TALL}`, role: "img", "aria-label": `entropy per ${stepName} and step` }, cells, labels,
      s("text", { x: LEFT, y: TALL - 6 }, format(steps[0])), s("text", { x: WIDE - RIGHT, y: TALL - 6, "text-anchor": "end" }, format(steps.at(-1)))));
}

/* ---- time ---- */
function timing() {
  const columns = run.metrics?.columns || {}, mean = (name) => { const known = (columns[name] || []).filter(isNumber); return known.length ? sum(known) / known.length : 0; };
  const phases = Object.keys(columns).filter((name) => name.startsWith("seconds/") && name !== "seconds/total").map((name) => [name.slice(8), mean(name)]);
  if (!phases.length) return null;
  const measured = sum(phases.map(([, t]) => t)), total = Math.max(mean("seconds/total"), measured);
  if (total - measured > .005 * total) phases.push(["the rest", total - measured]);
  const fillOf = (i) => (phases[i][0] === "the rest" ? "var(--line)" : colour(i));
  const bar = h("div", { class: "stack", role: "img", "aria-label": "share of each phase in a step" }, phases.map(([name, t], i) => h("i", { style: { width: `${100 * t / total}%`, background: fillOf(i) }, title: `${words(name)} ${format(t)} s` })));
  const legend = h("div", { class: "legend num" }, phases.map(([name, t], i) => h("span", {}, h("span", { class: "swatch", style: { background: fillOf(i) } }), `${words(name)} `, h("b", {}, `${format(t)} s`), h("span", { class: "soft" }, ` ${(100 * t / total).toFixed(0)} %`))));
  const lists = [["seconds per step", Object.keys(columns).filter((name) => name.startsWith("seconds/"))], ["images_per_second", ["images_per_second"]]].filter(([, list]) => list.every((name) => columns[name]?.some(isNumber)));
  return section("time", "Where the time goes", `A mean step takes ${format(total)} s${columns.images_per_second ? ` and draws ${format(mean("images_per_second"))} images per second` : ""}.`,
    h("div", { class: "card" }, bar, legend), h("div", { class: "charts" }, lists.map(([title, list]) => metricChart(title, list))));
}

/* ---- tables ---- */
function cell(name, value, range) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "object") return String(value);
  const whisker = range && value.interval && isNumber(value.value) && s("svg", { class: "whisker", viewBox: "0 0 118 9", "aria-hidden": "true" },
    s("line", { class: "rail", x1: 0, x2: 118, y1: 4.5, y2: 4.5 }), s("line", { x1: range(value.interval[0]), x2: range(value.interval[1]), y1: 4.5, y2: 4.5 }), s("circle", { cx: range(value.value), cy: 4.5, r: 3 }));
  return [formatAs(name, value.value, formatEven), value.interval && h("span", { class: "ci" }, formatInterval(name, value.interval)), whisker];
}
function table({ title, rows }) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.cells)))];
  const ranges = Object.fromEntries(names.map((name) => {
    const ends = rows.flatMap(({ cells }) => (cells[name]?.interval ? [...cells[name].interval, cells[name].value] : []));
    const low = Math.min(...ends), span = Math.max(...ends) - low || 1;
    return [name, ends.length ? (value) => 4 + 110 * (value - low) / span : null];
  }));
  const wide = (name) => (rows.some(({ cells }) => typeof cells[name] === "string" && cells[name].length > 24) ? "wrap" : null);
  return h("div", { class: "card scroll" }, h("table", {}, h("caption", {}, words(title)),
    h("thead", {}, h("tr", {}, h("th", {}), names.map((name) => h("th", { class: wide(name) }, words(name))))),
    h("tbody", {}, rows.map((row) => h("tr", {}, h("td", {}, words(row.label)), names.map((name) => h("td", { class: wide(name) }, cell(name, row.cells[name], ranges[name]))))))));
}
function results() {
  const rest = Object.keys(run.facts).length && h("div", { class: "card" }, facts(run.facts));
  return section("results", "Results", run.tables.length ? "Square brackets are intervals; the line under a number draws it on the column's own range." : null, absent("tables"), run.tables.length || rest ? h("div", { class: "tables" }, run.tables.map(table), rest || null) : null);
}

/* ---- probe, events, configuration ---- */
function errorBars(title, says, points) {
  const ends = points.flatMap((p) => [p.value, ...(p.interval || [])]).filter(isNumber);
  const low = Math.min(0, ...ends), high = Math.max(...ends) * 1.05 || 1;
  const x = (i) => LEFT + (WIDE - LEFT - RIGHT) * (i + .5) / points.length, y = (value) => TALL - BOTTOM - (TALL - TOP - BOTTOM) * (value - low) / (high - low);
  const bar = Math.min(34, .55 * (WIDE - LEFT - RIGHT) / points.length);
  return h("div", { class: "card chart" }, h("h3", {}, title), h("p", { class: "says" }, says), s("svg", { viewBox: `0 0 ${WIDE} ${TALL}`, role: "img", "aria-label": title },
    ticks(low, high, 4).map((t) => [s("line", { class: "gridline", x1: LEFT, x2: WIDE - RIGHT, y1: y(t), y2: y(t) }), s("text", { x: LEFT - 6, y: y(t) + 3.5, "text-anchor": "end" }, format(t))]),
    points.map((p, i) => [
      isNumber(p.value) && s("rect", { x: x(i) - bar / 2, width: bar, y: Math.min(y(p.value), y(0)), height: Math.abs(y(p.value) - y(0)), fill: "var(--accent)", opacity: .45, rx: 2 }, s("title", {}, `${p.name}: ${format(p.value)}${p.interval ? ` ${formatInterval("", p.interval)}` : ""}`)),
      p.interval && s("line", { x1: x(i), x2: x(i), y1: y(p.interval[0]), y2: y(p.interval[1]), stroke: "var(--ink)", "stroke-width": 1.5 }),
      s("text", { x: x(i), y: TALL - 6, "text-anchor": "middle" }, p.name)])));
}
const PROBED = {
  signal_share: ["signal, step by step", "Share of the gradient's signal that comes from each step of drawing."],
  noise_share: ["noise, step by step", "Share of the gradient's noise that comes from each step of drawing."],
  variance_share: ["reward settled by step m", "Share of the reward's variance that the first m steps decide."],
};
function probe() {
  const charts = (run.probe.charts || []).map(({ name, points }) => errorBars(...(PROBED[name] || [words(name), ""]), points));
  const advice = run.probe.recommendations || [];
  return section("probe", "Probe", charts.length ? "What decides a run, measured on this model and reward. Thin lines: intervals." : null, absent("probe"),
    charts.length ? h("div", { class: "charts" }, charts) : null, advice.length ? h("div", { class: "card" }, h("h3", {}, "Recommended"), h("ul", { class: "advice" }, advice.map((line) => h("li", {}, prose(line))))) : null,
    Object.keys(run.probe.facts || {}).length ? h("div", { class: "card" }, facts(run.probe.facts)) : null);
}
function when(time) {
  const date = isNumber(time) ? new Date(1000 * time) : new Date(time);
  return Number.isNaN(date.getTime()) ? String(time ?? "") : date.toISOString().slice(0, 19).replace("T", " ");
}
function events() {
  return section("events", "Events", null, absent("events"), run.events.length ? h("div", { class: "card log" }, run.events.map((event) => [
    h("span", { class: "soft num", title: "UTC" }, when(event.time)), h("span", { class: "num" }, isNumber(event.step) ? `step ${event.step} ` : "", h("b", { class: troubles().includes(event) ? "bad" : "" }, event.kind)), h("span", {}, event.message)])) : null);
}
function configuration() {
  return section("config", "Configuration", null, h("details", { class: "card" }, h("summary", {}, prose("everything that was set, as `varl train` takes it back")), h("pre", {}, run.config)));
}

/* ---- a comparison of runs ---- */
function comparison() {
  const many = run.runs.map((name, i) => h("span", {}, h("span", { class: "swatch", style: { background: colour(i) } }), name));
  const line = (row) => h("tr", {}, row.map((text, i) => h("td", { class: i ? "mono wrap" : "wrap" }, isNumber(text) ? formatEven(text) : String(text ?? "–"))));
  const grid = (rows) => h("div", { class: "card scroll" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", {}), run.runs.map((name) => h("th", { class: "wrap" }, name)))), h("tbody", {}, rows.map(line))));
  const title = h("header", {}, h("div", { class: "eyebrow" }, "VARL · comparison"), h("h1", {}, run.title), h("div", { class: "legend", style: { "margin-top": "10px" } }, many));
  return [title, h("nav", { "aria-label": "sections" }),
    section("equal", "Is it a fair comparison?", null, run.unequal.length ? h("div", { class: "card warn" }, h("ul", { class: "advice" }, run.unequal.map((text) => h("li", {}, text)))) : h("div", { class: "card" }, "Same seed, same number of judged pictures, same time.")),
    section("final", "Final metrics", run.last, grid(run.metrics)),
    section("settings", "What was set differently", null, run.settings.length ? grid(run.settings) : h("div", { class: "absent" }, "Nothing: the configurations agree.")),
    section("curves", "Curves", "Strong: moving average. Faint: as measured.", h("div", { class: "row spread" }, h("span", {}), smoothing()),
      h("div", { class: "charts" }, run.curves.map(({ name, series }) => chart(name, series.map((each) => ({ ...each, colour: colour(each.run), name: run.runs[each.run], legend: true }))))))];
}

/* ---- the page ---- */
const page = document.getElementById("page");
const parts = run.kind === "run"
  ? [header(), h("nav", { "aria-label": "sections" }), gallery(), training(), drawOrder(), credit(), monitor(), curves(), entropy(), timing(), results(), probe(), events(), configuration()]
  : comparison();
page.replaceChildren(...parts.filter(Boolean), h("footer", {}, "Made by VARL. This page holds everything it shows and asks no server for anything."));
const links = sections.map(([id, title]) => h("a", { href: `#${id}` }, title));
page.querySelector("nav").append(...links);
/* The link of the section that is being read: the last one whose head has passed the upper third. */
function markHere() {
  const passed = sections.filter(([id]) => document.getElementById(id).getBoundingClientRect().top < window.innerHeight / 3);
  for (const link of links) link.classList.toggle("here", link.hash === `#${(passed.at(-1) || sections[0])[0]}`);
}
window.addEventListener("scroll", markHere, { passive: true });
if (film) {
  if (followLink()) document.getElementById("film").scrollIntoView();
  else show(film.steps.length - 1, 0, true);
  window.addEventListener("hashchange", followLink);
}
markHere();
root.dataset.ready = "true";
