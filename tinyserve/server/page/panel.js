// ---- The panel: an answer ----

function show(turn) {
  if (shown !== turn) $("strip").replaceChildren();
  shown = turn;
  const { usage, tokens = [], first, seconds: last } = turn ?? {};
  const written = usage?.completion_tokens ?? tokens.length;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  $("speed").textContent = last > first && written > 1 ? short((written - 1) / (last - first)) : "–";
  $("first").textContent = first === undefined ? "–" : seconds(first);
  $("read").textContent = usage?.prompt_tokens ?? "–";
  $("cached").textContent = cached ? `tokens read, ${cached} from the cache` : "tokens read";
  $("written").textContent = written || "–";
  showStrip(tokens);
}

/** A bar for each token, as high as its surprise of -log2 p bits; all of 8 bits and more are as high as can be. */
function showStrip(tokens) {
  for (const token of tokens.slice($("strip").children.length)) {
    const column = el("i");
    column.style.height = `${Math.min(100, 100 * -token.logprob / Math.LN2 / 8)}%`;
    column.dataset.heat = heat(token);
    $("strip").append(column);
  }
  $("strip").classList.toggle("dense", tokens.length > 100);
  const mean = tokens.reduce((sum, { logprob }) => sum - logprob, 0) / tokens.length;
  const bits = (mean / Math.LN2).toFixed(2);
  $("surprise").textContent = tokens.length
    ? `${bits} bits a token: as if it chose among ${Math.exp(mean).toFixed(1)} equal ones each time.`
    : "A bar for each token of the answer, as high as the token was improbable.";
}

async function showCache() {
  const headers = apiKey ? { Authorization: `Bearer ${apiKey}` } : {};
  const response = await fetch("/stats", { headers, cache: "no-store" }).catch(() => null); // watchServer tells of it
  const stats = await response?.json().catch(() => null);
  const own = stats?.models?.[$("model").value];
  if (!own) return;
  const used = own.num_blocks - own.num_free_blocks;
  const share = own.prompt_tokens ? own.cached_tokens / own.prompt_tokens : 0;
  $("blocks").value = used / own.num_blocks;
  // The room is planned, and a page of it is the process's from when it is first used.
  const blocks = `${used} of ${counted(own.num_blocks, "block")} (${bytes(own.cache_bytes)}, taken only as used)`;
  const users = `${counted(own.num_running, "answer")}, ${own.num_waiting} waiting`;
  const read = counted(own.prompt_tokens, "prompt token");
  $("cache").textContent = `${blocks} in use by ${users}. Of ${read} so far, ${percent(share)} came from the cache.`;
}

// ---- The panel: the model and its layers ----

let mapped = null; // the model whose map is drawn

async function showModel() {
  const model = currentModel();
  $("notice").hidden = isChat();
  $("notice").textContent = `${model?.id} has no chat template: it goes on with your text, and answers no questions.`;
  $("prompt").placeholder = isChat() ? "Ask something" : "A text to go on with";
  $("prompt").ariaLabel = isChat() ? "Your question" : "Continue this text";
  const starts = isChat() ? ["What is the capital of France?", "Write a haiku about rain.", "Count to ten in French."]
    : ["The capital of France is", "Once upon a time, there was"];
  $("examples").replaceChildren(...starts.map((start) => button(start, () => send(start))));
  if (!model || mapped === model.id || !$("pane-model").open) return;
  mapped = model.id;
  try {
    const report = await (await api(`/inspect?model=${encodeURIComponent(model.id)}`)).json();
    if (mapped === model.id) drawModel(report, model);
  } catch (error) {
    mapped = null;
    $("map").replaceChildren(text("p", error.message, { className: "error" }));
  }
}

const PARTS = {
  embedding: "Embedding", position: "Positions", attention: "Attention", mamba: "Mamba", mlp: "MLP", experts: "Experts",
  router: "Router", norm: "Norms", head: "Head",
};
const HINT = "Point at a layer for its size.";
const swatch = (part) => el("i", { className: "swatch", "data-part": part });
const section = (title, ...children) => el("section", {}, text("h3", title), ...children);

function drawModel(report, { id, dtype, weights: kept }) {
  const dtypes = { w8a16: "int8", w8a8: "int8", w4a16: "int4", w4a8: "int4" };
  const weights = dtypes[dtype] ?? (dtype in report.weight_bytes ? dtype : "int8"); // auto, until it is loaded
  const perParameter = report.weight_bytes[weights] / report.parameters;
  const isSparse = report.active_parameters < report.parameters;
  const active = isSparse ? `, ${short(report.active_parameters)} of them for each token` : "";
  const cache = report.kv_bytes_per_token[weights === "float32" ? "float32" : "bfloat16"];
  const facts = {
    ...report.architecture, ...report.sizes,
    vocabulary: counted(report.vocab_size, "token"), context: counted(report.max_position_embeddings, "token"),
    cache: `${bytes(cache)} a token`, state: `${bytes(report.state_bytes_per_sequence)} a sequence`,
    licence: report.license ?? "not known",
  };
  if (!report.state_bytes_per_sequence) delete facts.state;
  const memory = kept ? `weights in ${kept}` : `${bytes(report.weight_bytes[weights])} of weights in ${weights}`;
  const size = text("p", `${short(report.parameters)} parameters${active}; ${memory}.`, { className: "number" });
  const list = Object.entries(facts).flatMap(([term, fact]) => [text("dt", term), text("dd", fact)]);
  $("map").replaceChildren(section(id, size), layerSection(report, perParameter), partsTable(report, perParameter),
    section("Architecture", el("dl", { className: "facts" }, ...list)));
}

/** A row for each layer, the first one a token passes on top; bars as long as their parameters are many. */
function layerSection({ layer_types: kinds, parameters_by_component: parameters }, perParameter) {
  const count = (kind) => kinds.filter((other) => other === kind).length;
  const halves = ["mlp", "experts"].filter((part) => parameters[part])
    .map((part) => ({ part, size: parameters[part] / kinds.length }));
  const rows = kinds.map((kind) => [{ part: kind, size: parameters[kind] / count(kind) }, ...halves]);
  const total = (row) => row.reduce((sum, { size }) => sum + size, 0);
  const widest = Math.max(...rows.map(total));
  const used = [...new Set(rows.flat().map(({ part }) => part))];
  const key = used.map((part) => el("span", {}, swatch(part), PARTS[part] ?? part));
  const note = text("p", HINT, { className: "small number" });
  const list = el("ol", { className: "layers" }, ...rows.map((row, i) => {
    const sizes = row.map(({ part, size }) => `${PARTS[part] ?? part} ${short(size)}`).join(" + ");
    const words = `Layer ${i + 1}: ${sizes}, about ${bytes(total(row) * perParameter)}`;
    const bars = row.map(({ part, size }) => {
      const cell = el("i", { "data-part": part });
      cell.style.width = `calc((100% - 2rem) * ${size / widest})`;
      return cell;
    });
    const number = text("span", i === 0 || i % 5 === 4 ? i + 1 : "");
    return el("li", { ariaLabel: words, onpointerenter: () => { note.textContent = words; } }, number, ...bars);
  }));
  list.onpointerleave = () => { note.textContent = HINT; };
  return section(counted(kinds.length, "layer"), el("p", { className: "row small" }, ...key), list, note);
}

function partsTable({ parameters, parameters_by_component: parts }, perParameter) {
  const head = ["Part", "Parameters", "Share", "About"].map((title) => text("th", title, { scope: "col" }));
  const rows = Object.entries(parts).sort(([, a], [, b]) => b - a).map(([part, size]) => el("tr", {},
    el("th", { scope: "row" }, swatch(part), PARTS[part] ?? part),
    ...[short(size), percent(size / parameters), bytes(size * perParameter)].map((cell) => text("td", cell))));
  return section("Parameters", el("table", { className: "parts number" },
    el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
}

// ---- The same request from elsewhere ----

/** A value as Python writes it; a line for each item of lists and dicts that hold others. */
function python(value, indent = "    ") {
  if (value === null || typeof value === "boolean") return { null: "None", true: "True", false: "False" }[value];
  if (typeof value !== "object") return JSON.stringify(value);
  const [left, right] = Array.isArray(value) ? "[]" : "{}";
  const inner = indent + "    ";
  const label = (key) => left === "{" ? `${JSON.stringify(key)}: ` : "";
  const items = Object.entries(value).map(([key, item]) => label(key) + python(item, inner));
  const isFlat = Object.values(value).every((item) => typeof item !== "object");
  if (isFlat) return left + items.join(", ") + right;
  return left + items.map((item) => `\n${inner}${item},`).join("") + `\n${indent}${right}`;
}

function snippets() {
  const draft = $("prompt").value.trim();
  const asked = draft ? [...turns, { role: "user", text: draft }] : turns.slice(0, turns.findLastIndex(questions) + 1);
  const { path, body } = request(asked);
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const curl = [`curl -N ${location.origin}${path}`, "-H 'Content-Type: application/json'",
    ...(apiKey ? ['-H "Authorization: Bearer $TINYSERVE_API_KEY"'] : []), `-d '${quoted}'`].join(" \\\n  ");
  const isExtra = ([field]) => FIELDS.some(({ name, isExtra }) => isExtra && name === field);
  const extra = Object.fromEntries(Object.entries(body).filter(isExtra));
  const known = Object.fromEntries(Object.entries(body).filter((entry) => !isExtra(entry)));
  const named = { ...known, ...(Object.keys(extra).length && { extra_body: extra }) };
  const key = apiKey ? 'os.environ["TINYSERVE_API_KEY"]' : '"none"';
  const lines = [
    ...(apiKey ? ["import os", ""] : []), "from openai import OpenAI", "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${key})`,
    `stream = client.${isChat() ? "chat.completions" : "completions"}.create(`,
    ...Object.entries(named).map(([field, value]) => `    ${field}=${python(value)},`), ")",
    "for chunk in stream:", "    if chunk.choices:",
    `        print(chunk.choices[0].${isChat() ? "delta.content" : "text"} or "", end="", flush=True)`,
  ];
  return [codeBlock(curl, "curl"), codeBlock(lines.join("\n"), "Python")];
}

function exportJson() {
  const used = { model: $("model").value, system: $("system").value, sampling: sampling() };
  const data = { exported: new Date().toISOString(), ...used, turns };
  const href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
  el("a", { href, download: "tinyserve-conversation.json" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

