"use strict";

// ---- Small helpers ----

const $ = (id) => document.getElementById(id);

/** Makes an element. Strings among the children become text nodes: markup in them stays text. */
function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const text = (tag, textContent, properties = {}) => el(tag, { textContent, ...properties });
const button = (words, onclick, className = "") => text("button", words, { type: "button", onclick, className });

/** The browser's storage may be full or forbidden; the page works without it. */
function recall(storage, name, otherwise) {
  try { return JSON.parse(storage.getItem(`tinyserve.${name}`)) ?? otherwise; } catch { return otherwise; }
}
function keep(storage, name, value) {
  try { storage.setItem(`tinyserve.${name}`, JSON.stringify(value)); return true; } catch { return false; }
}

const seconds = (s) => s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(1)} s`;
const counted = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
function percent(p) {
  if (p < 0.0001) return "< 0.01 %";
  return `${(100 * p).toFixed(p >= 0.9995 ? 0 : p >= 0.1 ? 1 : 2)} %`;
}
/** 134515008 -> "135 M". */
function short(n, units = ["", " k", " M", " G", " T"]) {
  let i = 0;
  for (; n >= 999.5 && i < units.length - 1; i++) n /= 1000;
  return `${n >= 99.5 || (i === 0 && n % 1 === 0) ? Math.round(n) : n.toPrecision(2)}${units[i]}`;
}
const bytes = (n) => short(n, [" B", " kB", " MB", " GB", " TB"]);

async function copy(what, from) {
  try {
    await navigator.clipboard.writeText(what);
  } catch { // browsers keep the clipboard from pages that came by plain http, but for localhost
    const area = el("textarea", { value: what });
    from.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  from.textContent = "Copied";
  setTimeout(() => { from.textContent = "Copy"; }, 1500);
}

// ---- State ----

// A turn is {role, text}, and of the model also {model, chat, tokens, usage, first, seconds, end, error}. Its tokens
// are as the API gives them: {token, bytes, logprob, top_logprobs}.
let turns = recall(sessionStorage, "turns", []);
let apiKey = recall(sessionStorage, "key", null);
const settings = recall(localStorage, "settings", {});
let models = [];
let running = null; // the AbortController of the answer that is being written
let editing = null; // the question that is being rewritten
let shown = null; // the answer that the panel tells about
const views = new Map(); // turn -> its parts on the page

function saveTurns() {
  if (keep(sessionStorage, "turns", turns)) return;
  // Probabilities take most of the room. Where it is short, the text is worth more.
  keep(sessionStorage, "turns", turns.map((turn) => ({ ...turn, tokens: [] })));
}
function set(name, value) {
  settings[name] = value;
  keep(localStorage, "settings", settings);
}
const currentModel = () => models.find((model) => model.id === $("model").value);
const isChat = () => currentModel()?.chat !== false;
const questions = (turn) => turn.role === "user";

