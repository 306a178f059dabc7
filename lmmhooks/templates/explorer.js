"use strict";
(() => {
const LEVELS = 254, ABSENT = 255;
const data = JSON.parse(document.getElementById("explorer-data").textContent);
const $ = id => document.getElementById(id);
const state = {step: 0, band: 0, image: 0, kind: "baseline", show: "plain", unit: "tokens", smooth: true, rings: true, without: false};
const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};
const percent = (value, digits = 1) => value === null ? "-" : `${(100 * value).toFixed(digits)} %`;
const likely = p => p < 0.001 ? "<0.001" : p.toFixed(3);
const small = value => value === 0 ? "0 %" : percent(value, Math.abs(value) < 0.001 ? 3 : 2);

// Answers ------------------------------------------------------------------------------------------------------------

const traceOf = run => run.traces[state.kind] || run.traces.baseline;
const groups = trace => state.unit === "words" ? trace.words : trace.tokens.map((_, t) => [t]);
const now = trace => groups(trace)[state.step] || [];
const textOf = (trace, group) => group.map(t => trace.tokens[t]).join("") || "(end)";
const numSteps = () => Math.max(...data.runs.map(traceOf).filter(Boolean).map(trace => groups(trace).length));

// Maps ---------------------------------------------------------------------------------------------------------------

const decoded = new Map();
function values(r, trace, image) {
  const key = [r, state.kind, image, state.band].join();
  if (!decoded.has(key)) {
    const most = data.most[image][state.band];
    const bytes = Uint8Array.from(atob(trace.images[image].data[state.band]), c => c.charCodeAt(0));
    decoded.set(key, Float32Array.from(bytes, b => b === ABSENT ? NaN : most * (b / LEVELS) ** 2));
  }
  return decoded.get(key);
}

/* The map of a run at the current step: mean over the tokens of a word, sinks taken out if wanted. */
function mapOf(r) {
  const trace = traceOf(data.runs[r]);
  const cells = trace && trace.images[state.image];
  const tokens = cells ? now(trace) : [];
  if (!tokens.length) return null;
  const size = cells.rows * cells.columns, all = values(r, trace, state.image), out = new Float32Array(size);
  for (const t of tokens) for (let i = 0; i < size; i++) out[i] += all[t * size + i] / tokens.length;
  if (state.without) {
    const sum = () => out.reduce((total, v) => total + (v || 0), 0), before = sum();
    for (const i of cells.sinks) if (!Number.isNaN(out[i])) out[i] = 0;
    const left = sum();
    for (let i = 0; i < size; i++) out[i] *= left > 0 ? before / left : 0;
  }
  return {cells, values: out};
}

function shownMap(r) {
  const map = mapOf(r);
  if (state.show === "plain" || !map || r === 0) return map;
  const base = mapOf(0);
  if (!base || base.values.length !== map.values.length) return null;
  return {cells: map.cells, values: map.values.map((v, i) => v - base.values[i]), apart: true};
}

const range = () => data.ranges[state.kind][state.image][state.band];
const top = map => map && map.apart ? range().apart : range()[state.without ? "without" : "plain"];

// Colours ------------------------------------------------------------------------------------------------------------

const HEAT = [[8, 8, 24], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];
function colour(v, apart) {
  if (apart) {
    const size = Math.min(1, Math.abs(v)), end = v < 0 ? [38, 110, 220] : [220, 70, 30];
    return [...end, 235 * Math.sqrt(size)];
  }
  const x = Math.max(0, Math.min(1, v)) * (HEAT.length - 1), i = Math.min(HEAT.length - 2, Math.floor(x)), f = x - i;
  return [...HEAT[i].map((c, k) => c + f * (HEAT[i + 1][k] - c)), 80 + 150 * Math.sqrt(Math.max(0, Math.min(1, v)))];
}

// Panels -------------------------------------------------------------------------------------------------------------

const panels = data.runs.map((run, r) => {
  const card = make("section", "card panel"), strip = make("p", "strip");
  card.append(make("h3", "", run.name), strip);
  if (!run.traces.baseline) {
    strip.textContent = run.text || "(empty)";
    card.append(make("p", "soft", run.note));
    $("panels").append(card);
    return null;
  }
  const stage = make("div", "stage"), picture = make("img"), canvas = make("canvas");
  const said = make("p", "soft said"), at = make("p", "soft at"), bars = make("div", "bars");
  picture.alt = "";
  canvas.setAttribute("role", "img");
  stage.append(picture, canvas);
  if (data.images.length && run.traces.baseline.images[state.image]) card.append(stage, at);
  else if (data.images.length) card.append(make("p", "soft", "Where visual tokens lie on the image is not known for this model."));
  card.append(said, bars);
  $("panels").append(card);
  stage.addEventListener("pointermove", event => hover(event, stage));
  stage.addEventListener("pointerleave", () => hover(null));
  return {run, r, card, strip, stage, picture, canvas, said, at, bars};
}).filter(Boolean);

function drawStrip(panel) {
  const trace = traceOf(panel.run);
  panel.strip.replaceChildren(...groups(trace).map((group, step) => {
    const button = make("button", step === state.step ? "token now" : "token", textOf(trace, group));
    const p = Math.min(...group.map(t => trace.probability[t]));
    button.type = "button";
    button.style.setProperty("--doubt", (0.55 * (1 - p)).toFixed(3));
    button.title = `probability ${p.toFixed(3)}`;
    button.setAttribute("aria-pressed", step === state.step);
    button.addEventListener("pointerenter", event => event.pointerType === "mouse" && move(step, false));
    button.addEventListener("click", () => move(step, true));
    return button;
  }));
  panel.strip.onpointerleave = () => move(held, false);
}

function drawCanvas(panel) {
  const image = data.images[state.image], map = shownMap(panel.r), {canvas} = panel;
  if (panel.picture.src !== image.uri) panel.picture.src = image.uri;
  panel.stage.style.setProperty("--ratio", image.width / image.height);
  canvas.width = Math.round(Math.min(720, 720 * image.width / image.height));
  canvas.height = Math.round(canvas.width * image.height / image.width);
  const context = canvas.getContext("2d"), scale = canvas.width / image.width;
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!map) return;
  const {rows, columns, box, sinks, removed} = map.cells;
  const [left, high] = [box[0] * scale, box[1] * scale], [w, h] = [(box[2] - box[0]) * scale, (box[3] - box[1]) * scale];
  unseen(context, left, high, w, h, canvas);
  const pixels = new ImageData(columns, rows), most = top(map);
  map.values.forEach((v, i) => pixels.data.set(Number.isNaN(v) ? [0, 0, 0, 0] : colour(most > 0 ? v / most : 0, map.apart), 4 * i));
  const small = make("canvas");
  [small.width, small.height] = [columns, rows];
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = state.smooth;
  context.save();
  context.beginPath();
  context.rect(left, high, w, h);
  context.clip();
  context.drawImage(small, left, high, w, h);
  context.restore();
  const [cw, ch] = [w / columns, h / rows], last = data.bands[state.band][1];
  context.fillStyle = "rgb(128 128 128 / .85)";
  removed.forEach((layer, i) => layer <= last && context.fillRect(left + (i % columns) * cw, high + Math.floor(i / columns) * ch, cw + .5, ch + .5));
  if (state.rings) for (const i of sinks) {
    for (const [stroke, width] of [["#000", 4], ["#4fe3ff", 2]]) {
      context.strokeStyle = stroke;
      context.lineWidth = width;
      context.beginPath();
      context.arc(left + (i % columns + .5) * cw, high + (Math.floor(i / columns) + .5) * ch, Math.max(4, .55 * Math.min(cw, ch)), 0, 7);
      context.stroke();
    }
  }
  canvas.setAttribute("aria-label", `Attention of ${panel.run.name} at ${textOf(traceOf(panel.run), now(traceOf(panel.run)))}`);
}

/* What the model never saw is hatched. */
function unseen(context, left, high, w, h, canvas) {
  context.save();
  context.beginPath();
  context.rect(0, 0, canvas.width, canvas.height);
  context.rect(left, high, w, h);
  context.clip("evenodd");
  context.fillStyle = "rgb(40 44 50 / .7)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.strokeStyle = "rgb(150 156 164 / .9)";
  context.lineWidth = 2;
  context.beginPath();
  for (let x = -canvas.height; x < canvas.width; x += 10) {
    context.moveTo(x, canvas.height);
    context.lineTo(x + canvas.height, 0);
  }
  context.stroke();
  context.restore();
}

function drawWords(panel) {
  const trace = traceOf(panel.run), tokens = now(trace), t = tokens[0];
  panel.bars.replaceChildren();
  if (t === undefined) {
    panel.said.textContent = "the answer has ended";
    return;
  }
  const mean = list => tokens.reduce((total, k) => total + list[k], 0) / tokens.length;
  const parts = [`probability ${mean(trace.probability).toFixed(3)}`, `rank ${trace.rank[t]}`];
  if (trace.dlogp) parts.push(trace.dlogp[t] === null ? "ruled out" : `log p ${trace.dlogp[t] < 0 ? "" : "+"}${trace.dlogp[t].toFixed(3)} to baseline`);
  if (trace.visual) parts.push(`${percent(mean(trace.share))} of its attention on the image`);
  if (trace.num_sinks) parts.push(`${trace.num_sinks === 1 ? "1 sink takes" : `${trace.num_sinks} sinks take`} ${percent(trace.sink_share)} of that over the answer`);
  panel.said.textContent = parts.join(" · ");
  for (const [text, p] of trace.top[t]) {
    const row = make("div", text.trim() === trace.tokens[t].trim() ? "bar chosen" : "bar");
    row.style.setProperty("--p", p);
    row.append(make("span", "", text.trim() ? text : JSON.stringify(text)), make("span", "", likely(p)));
    panel.bars.append(row);
  }
}

// Pointing -----------------------------------------------------------------------------------------------------------

function hover(event, stage) {
  const place = event && stage.getBoundingClientRect();
  for (const panel of panels) {
    const map = shownMap(panel.r), image = data.images[state.image];
    panel.at.textContent = " ";
    if (!event || !map) continue;
    const {rows, columns, box, removed, merged, sinks} = map.cells;
    const x = (event.clientX - place.left) / place.width * image.width, y = (event.clientY - place.top) / place.height * image.height;
    const c = Math.floor((x - box[0]) / (box[2] - box[0]) * columns), r = Math.floor((y - box[1]) / (box[3] - box[1]) * rows);
    if (c < 0 || r < 0 || c >= columns || r >= rows) {
      panel.at.textContent = "the model does not see this part";
      continue;
    }
    const i = r * columns + c, gone = removed[i] < data.layers;
    const value = Number.isNaN(map.values[i]) ? "no token" : `${map.apart && map.values[i] > 0 ? "+" : ""}${small(map.values[i])} of the image's attention`;
    const left = gone ? `; removed ${removed[i] ? `before layer ${removed[i]}` : "before the decoder"}` : "";
    panel.at.textContent = `row ${r}, column ${c}${merged ? " (mean of crops)" : ""}: ${value}${sinks.includes(i) ? "; sink" : ""}${left}`;
  }
}

// Entropy ------------------------------------------------------------------------------------------------------------

function drawEntropy() {
  const shown = panels.filter(panel => traceOf(panel.run).visual > 1);
  $("entropy").hidden = !shown.length;
  const divided = $("divided").checked, scale = trace => divided ? Math.log(trace.visual) : 1;
  const most = divided ? 1 : Math.max(...shown.map(panel => Math.log(traceOf(panel.run).visual)));
  $("entropy-most").textContent = divided ? "1" : most.toFixed(2);
  $("heats").replaceChildren(...shown.map(panel => {
    const trace = traceOf(panel.run), figure = make("figure", "heat"), canvas = make("canvas"), note = make("figcaption", "soft", panel.run.name);
    const rows = trace.entropy.length, columns = data.layers;
    [canvas.width, canvas.height] = [rows, columns];
    const pixels = new ImageData(rows, columns);
    trace.entropy.forEach((step, t) => step.forEach((v, l) => {
      const [r, g, b] = v === null ? [128, 128, 128] : colour(v / scale(trace) / most, false);
      pixels.data.set([r, g, b, 255], 4 * (l * rows + t));
    }));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Entropy of ${panel.run.name} by token and layer`);
    canvas.addEventListener("pointermove", event => {
      const place = canvas.getBoundingClientRect();
      const t = Math.min(rows - 1, Math.floor((event.clientX - place.left) / place.width * rows)), l = Math.min(columns - 1, Math.floor((event.clientY - place.top) / place.height * columns));
      const v = trace.entropy[t] && trace.entropy[t][l];
      note.textContent = `${panel.run.name}: token ${t + 1}, layer ${l}: ${v === null || v === undefined ? "not read" : (v / scale(trace)).toFixed(3)}`;
    });
    canvas.addEventListener("pointerleave", () => { note.textContent = panel.run.name; });
    figure.append(canvas, note);
    return figure;
  }));
}

// Controls -----------------------------------------------------------------------------------------------------------

let held = 0;
function move(step, hold) {
  state.step = Math.max(0, Math.min(numSteps() - 1, step));
  if (hold) held = state.step;
  $("step").value = state.step;
  draw(false);
}

function draw(anew = true) {
  const steps = numSteps(), trace = traceOf(panels[0].run);
  $("step").max = steps - 1;
  $("where").textContent = `${state.unit === "words" ? "word" : "token"} ${state.step + 1} of ${steps}`;
  for (const panel of panels) {
    if (anew) drawStrip(panel);
    else [...panel.strip.children].forEach((button, step) => {
      button.classList.toggle("now", step === state.step);
      button.setAttribute("aria-pressed", step === state.step);
    });
    if (panel.stage.isConnected) drawCanvas(panel);
    drawWords(panel);
  }
  if (!data.images.length || !trace.images[state.image]) return;
  const apart = state.show === "apart", most = apart ? range().apart : range()[state.without ? "without" : "plain"];
  const stops = [0, .2, .4, .6, .8, 1].map(v => apart ? 2 * v - 1 : v);
  $("ramp").style.background = `linear-gradient(90deg, ${stops.map(v => { const [r, g, b, a] = colour(v, apart); return `rgb(${r} ${g} ${b} / ${apart ? a / 255 : 1})`; }).join()})`;
  $("least").textContent = apart ? `-${small(most)}` : "0";
  $("most").textContent = `${apart ? "+" : ""}${small(most)}`;
}

function choice(id, entries, apply) {
  const select = $(id);
  if (entries) select.replaceChildren(...entries.map(([value, text]) => { const option = make("option", "", text); option.value = value; return option; }));
  select.closest("label").hidden = select.options.length < 2;
  select.addEventListener("change", () => { apply(select.value); draw(); });
}

const span = ([first, last]) => first === last ? `${first}` : `${first} to ${last}`;
choice("band", data.bands.map((band, i) => [i, i ? span(band) : "all"]), value => { state.band = +value; });
choice("image", data.images.map((_, i) => [i, `${i + 1}`]), value => { state.image = +value; });
const own = data.runs.some(run => run.traces.own);
choice("along", [["baseline", "the baseline's answer"], ...(own ? [["own", "each its own answer"]] : [])], value => { state.kind = value; move(held, true); drawEntropy(); });
choice("show", [["plain", "attention"], ...(panels.length > 1 ? [["apart", "difference to baseline"]] : [])], value => { state.show = value; });
choice("unit", [["tokens", "tokens"], ["words", "words"]], value => {
  const trace = traceOf(panels[0].run), [token = 0] = now(trace);
  state.unit = value;
  move(Math.max(0, groups(trace).findIndex(group => group.includes(token))), true);
});
choice("cells", [["smooth", "smooth"], ["exact", "exact"]], value => { state.smooth = value === "smooth"; });
for (const id of ["rings", "without"]) $(id).addEventListener("change", event => { state[id] = event.target.checked; draw(false); });
$("divided").addEventListener("change", drawEntropy);
$("cover").addEventListener("input", event => $("panels").style.setProperty("--cover", event.target.value));
$("step").addEventListener("input", event => move(+event.target.value, true));
document.addEventListener("keydown", event => {
  if (event.target.closest("input, select, textarea") || event.altKey || event.ctrlKey || event.metaKey) return;
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by) { event.preventDefault(); move(state.step + by, true); }
});
const sinks = data.runs.some(run => Object.values(run.traces).some(trace => trace && trace.num_sinks));
for (const id of ["rings", "without"]) $(id).closest("label").hidden = !sinks;
for (const node of document.querySelectorAll("#explorer .needs-map")) node.hidden = !panels.some(panel => panel.stage.isConnected);
$("explorer").hidden = false;
draw();
drawEntropy();
})();
