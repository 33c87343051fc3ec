// ---- The glass box: tokens, and the card of one token ----

const HEATS = [
  [0.9, "90 % and more"], [0.5, "50 to 90 %"], [0.2, "20 to 50 %"], [0.05, "5 to 20 %"], [0, "less than 5 %"],
];
const heat = ({ logprob }) => HEATS.findIndex(([least]) => Math.exp(logprob) >= least);
const SPECIAL = /^<\|[^|]*\|>$|^<\/s>$/; // how models' makers write tokens that are no text, such as the end
const placeOf = new WeakMap(); // the element of a token -> {turn, index}

/** Draws the tokens that are new. A character may be spread over several: all but its last show bytes. */
function drawTokens(turn, view) {
  if (view.list?.parentNode !== view.body) {
    view.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    const ariaLabel = "Tokens; arrow keys go from one to the next";
    view.list = el("div", { className: "tokens", role: "listbox", ariaLabel });
    view.spans = [];
    view.body.replaceChildren(view.list);
  }
  for (const token of turn.tokens.slice(view.spans.length)) {
    const raw = rawBytes(token);
    const whole = raw ? view.decoder.decode(raw, { stream: true }) : token.token;
    const index = view.spans.length;
    const properties = { className: "token", role: "option", tabIndex: index ? -1 : 0 };
    const span = el("span", properties, ...tokenText(whole, token));
    span.dataset.heat = heat(token);
    span.hidden = token.thought ?? false; // what was thought is folded, above
    span.ariaLabel = spoken(token); // once it is pointed at, the alternatives too
    placeOf.set(span, { turn, index });
    view.spans.push(span);
    view.list.append(span);
  }
}

function tokenText(whole, token) {
  if (whole === "" || SPECIAL.test(whole)) return [text("span", whole || name(token), { className: "chip" })];
  const mark = () => [text("span", "⏎", { className: "mark", ariaHidden: "true" }), "\n"];
  return whole.split(/(\n)/).filter(Boolean).flatMap((part) => part === "\n" ? mark() : [part]);
}

/** A token's bytes. Completions have none; there, a token that is no text is written "bytes:\xf0\x9f". */
function rawBytes({ token, bytes }) {
  if (bytes) return Uint8Array.from(bytes);
  if (!token.startsWith("bytes:")) return null;
  return Uint8Array.from(token.matchAll(/\\x([0-9a-f]{2})/gi), ([, digits]) => parseInt(digits, 16));
}

/** A token as the card names it: spaces and new lines can be seen, parts of characters are bytes. */
function name(token) {
  const raw = rawBytes(token);
  let whole = token.token;
  try {
    if (raw) whole = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(raw);
  } catch {
    return [...raw].map((byte) => byte.toString(16).padStart(2, "0").toUpperCase()).join(" ");
  }
  return (whole || token.token || "end").replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

/** A token as a screen reader names it, with its probability. */
function spoken(token) {
  const words = name(token).replaceAll("␣", " ").replaceAll("⏎", " new line ").replaceAll("⇥", " tab ").trim();
  return `${words || "space"}, ${percent(Math.exp(token.logprob))}`;
}

/** What the card says of a token: its rank, and a row for each alternative, the likeliest first. */
function explain(token) {
  const same = (other) => other.token === token.token && String(other.bytes) === String(token.bytes);
  const top = token.top_logprobs ?? [];
  const better = top.filter((other) => other.logprob > token.logprob).length;
  const rows = (top.some(same) ? top : [...top, token])
    .map((row) => ({ name: name(row), p: Math.exp(row.logprob), chosen: same(row) }));
  const isSure = better < top.length || !top.length; // others, which were not sent, may stand between
  return { rank: isSure ? `rank ${better + 1}` : `after rank ${better}`, rows };
}

function showCard(span) {
  const { turn, index } = placeOf.get(span);
  const token = turn.tokens[index];
  const { rank, rows } = explain(token);
  const rest = 1 - rows.reduce((sum, { p }) => sum + p, 0);
  if (rest >= 0.0001) rows.push({ name: "all others", p: rest });
  hideCard();
  const figure = [text("strong", percent(Math.exp(token.logprob))), text("small", `${rank}, token ${index + 1}`)];
  $("card").replaceChildren(el("div", { className: "figure number" }, ...figure), ...rows.map(bar));
  const others = rows.filter(({ chosen }) => !chosen).slice(0, 3).map((row) => `${row.name} ${percent(row.p)}`);
  span.ariaLabel = [spoken(token), rank, ...(others.length ? [`not chosen: ${others.join(", ")}`] : [])].join(", ");
  span.classList.add("shown");
  if (turn === shown) $("strip").children[index]?.classList.add("shown");
  $("card").hidden = false;
  place($("card"), span.getClientRects()[0]);
}

function bar({ name, p, chosen }) {
  const fill = el("i");
  fill.style.width = `${100 * p}%`;
  return el("div", { className: `bar number ${chosen ? "chosen" : ""}` },
    text("span", name), el("div", {}, fill), text("span", percent(p)));
}

/** Below the token, or above where there is no room; beside the panel. */
function place(card, box) {
  const isBelow = box.bottom + 8 + card.offsetHeight < innerHeight;
  const right = $("scroll").getBoundingClientRect().right;
  card.style.left = `${Math.max(8, Math.min(box.left - 16, right - card.offsetWidth - 8))}px`;
  card.style.top = `${isBelow ? box.bottom + 8 : Math.max(8, box.top - card.offsetHeight - 8)}px`;
}

function hideCard() {
  $("card").hidden = true;
  document.querySelectorAll(".shown").forEach((node) => node.classList.remove("shown"));
}

/** Tab reaches one token of an answer, the arrows the others. */
function focusToken(span) {
  for (const other of span.parentNode.children) other.tabIndex = other === span ? 0 : -1;
  show(placeOf.get(span).turn);
  span.focus({ preventScroll: true });
  span.scrollIntoView({ block: "nearest" });
  showCard(span);
}

function tokenKey(event) {
  const { turn, index } = placeOf.get(event.target);
  const { spans } = views.get(turn);
  const [before, after, last] = [index - 1, index + 1, spans.length - 1];
  const steps = { ArrowRight: after, ArrowDown: after, ArrowLeft: before, ArrowUp: before, Home: 0, End: last };
  const next = spans[steps[event.key]];
  if (!next) return;
  event.preventDefault();
  focusToken(next);
}


// ---- How a token was chosen: an explanation, which the server computes, in a frame of its own ----

/** The button below an answer explains the token that was clicked last, at first the last one that is text. */
function pick(span) {
  const { turn, index } = placeOf.get(span);
  views.get(turn).picked = index;
  drawFoot(turn);
}

function pickedOf(turn) {
  const last = turn.tokens.findLastIndex(({ token }) => token !== "" && !SPECIAL.test(token));
  return views.get(turn).picked ?? Math.max(0, last);
}

/** Has the server compute the answer once more, up to a token, and shows what each layer and each head made of it. */
async function explainToken(turn, index) {
  const { stream, stream_options, logprobs, top_logprobs, ...rest } = request(turns.slice(0, turns.indexOf(turn))).body;
  const raw = turn.tokens.slice(0, index).map((token) => rawBytes(token) ?? new TextEncoder().encode(token.token));
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const answer = raw.map((bytes) => decoder.decode(bytes, { stream: true })).join("");
  const [dialog, message, place] = ["inside-dialog", "inside-message", "inside"].map($);
  $("inside-title").textContent = `How ${name(turn.tokens[index])} was chosen`;
  message.textContent = "The model reads it once more.";
  place.replaceChildren();
  dialog.showModal();
  const gone = new AbortController();
  dialog.onclose = () => { gone.abort(); place.replaceChildren(); };
  try {
    const response = await api("/explain", { ...rest, answer, format: "html" }, gone.signal);
    const { html } = await response.json();
    message.textContent = "";
    place.replaceChildren(el("iframe", { srcdoc: html, sandbox: "allow-scripts", title: "Explanation" }));
  } catch (error) {
    if (error.name !== "AbortError") message.textContent = error.message;
  }
}
