// ---- The server ----

class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Fetches with the key, and asks for one where the server wants one. Raises ServerError; AbortError when stopped. */
async function api(path, body, signal) {
  const headers = { ...(body && { "Content-Type": "application/json" }) };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  const method = body ? "POST" : "GET";
  const options = { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  const response = await fetch(path, options).catch((error) => {
    if (error.name === "AbortError") throw error;
    setStatus("gone", "The server does not answer");
    throw new ServerError("The server does not answer. Is tinyserve serve still running?");
  });
  const message = await messageOf(response);
  if (!message) return response;
  if (response.status === 401) {
    if (await askForKey(message)) return api(path, body, signal);
    setStatus("refused", "The server wants an API key");
  }
  const wait = response.headers.get("Retry-After");
  const advice = wait ? ` It asks to wait ${counted(Number(wait), "second")}.` : "";
  throw new ServerError(message + advice, response.status);
}

/** What a response refuses with, or "" where it does not. */
async function messageOf(response) {
  if (response.ok) return "";
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `The server answered with status ${response.status}.`;
}

/** Yields {comment} and {data} of a stream of server-sent events; the network may cut it anywhere. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":")) yield { comment: line.slice(1).trim() };
      else if (line.startsWith("data:")) yield { data: line.slice(5).trim() };
    }
  }
}

let asking = null;
/** Resolves to whether there is a new key to try; several requests that are refused at once ask once. */
function askForKey(message) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-message").textContent = message;
    $("key").value = dialog.returnValue = "";
    dialog.onclose = () => {
      asking = null;
      if (dialog.returnValue === "use") setKey($("key").value.trim());
      resolve(dialog.returnValue === "use");
    };
    dialog.showModal();
  });
  return asking;
}
function setKey(key) {
  apiKey = key;
  keep(sessionStorage, "key", key);
  $("forget").hidden = key === null;
}

function setStatus(state, words) {
  $("status").dataset.state = state;
  if ($("status").textContent !== words) $("status").textContent = words; // each change is read aloud
}

/** Looks whether the server lives, so that its death is said before somebody has typed a question. */
async function watchServer() {
  if (running) return;
  const ill = await fetch("/health", { cache: "no-store" }).then(messageOf, () => "The server does not answer");
  if (running) return;
  if (ill) setStatus("gone", ill);
  else if (["gone", "busy"].includes($("status").dataset.state)) await loadModels();
}

async function loadModels() {
  try {
    models = (await (await api("/v1/models")).json()).data;
  } catch (error) {
    if (error.status && error.status !== 401) setStatus("gone", error.message);
    return;
  }
  const wanted = $("model").value || settings.model;
  const option = ({ id, loaded }) => el("option", { value: id, textContent: loaded ? id : `${id} (not loaded)` });
  $("model").replaceChildren(...models.map(option));
  $("model").value = models.some((model) => model.id === wanted) ? wanted : models[0]?.id;
  if (!running) setStatus("ready", "Ready"); // somebody may have asked meanwhile
  showModel();
}

// ---- Requests ----

const TOP_OF_TEXTS = 5; // alternatives of each token: OpenAI's most for completions

// What is left empty is not sent, and the model's makers decide. Small models ramble at a temperature of 1.
// Those that are extra OpenAI's client does not know.
const FIELDS = [
  { name: "max_tokens", label: "Most tokens", value: 512, min: 1, step: 1,
    hint: "Where an answer is cut off." },
  { name: "temperature", label: "Temperature", value: 0.2, min: 0, max: 2, step: 0.05,
    hint: "0 takes the likeliest token each time; above 1, unlikely ones gain." },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01,
    hint: "Draws from the likeliest tokens that add up to this." },
  { name: "top_k", label: "Top k", isExtra: true, min: 0, step: 1,
    hint: "Draws from this many of the likeliest tokens." },
  { name: "min_p", label: "Min p", isExtra: true, min: 0, max: 1, step: 0.01,
    hint: "Leaves out tokens below this share of the likeliest." },
  { name: "repetition_penalty", label: "Repetition penalty", isExtra: true, min: 0.05, step: 0.05,
    hint: "Above 1, what was said is less likely to come again." },
  { name: "seed", label: "Seed", step: 1,
    hint: "The same seed draws the same answer." },
  { name: "stop", label: "Stop", isText: true,
    hint: "Texts that end an answer, one a line." },
];

function sampling() {
  const filled = FIELDS.filter(({ name }) => $(name).value.trim() !== "");
  return Object.fromEntries(filled.map(({ name, isText }) => {
    const value = $(name).value;
    return [name, isText ? value.split("\n").filter(Boolean) : Number(value)];
  }));
}

/** The path and body that ask for an answer to these turns. */
function request(asked) {
  const model = $("model").value;
  const rest = { ...sampling(), stream: true, stream_options: { include_usage: true } };
  if (!isChat()) {
    const prompt = asked.findLast(questions)?.text ?? "";
    const glass = $("glass").checked && { logprobs: TOP_OF_TEXTS };
    return { path: "/v1/completions", body: { model, prompt, ...rest, ...glass } };
  }
  const system = $("system").value.trim();
  // A question without an answer is left out, but for the last: templates want the two by turns.
  const isKept = (turn, i) => questions(turn) ? i === asked.length - 1 || asked[i + 1].text : turn.text;
  const messages = asked.filter(isKept).map(({ role, text }) => ({ role, content: text }));
  if (system) messages.unshift({ role: "system", content: system });
  const glass = $("glass").checked && { logprobs: true, top_logprobs: 6 };
  return { path: "/v1/chat/completions", body: { model, messages, ...rest, ...glass } };
}

/** Asks for the next answer and writes it as it comes. */
async function answer() {
  const asked = [...turns];
  running = new AbortController();
  if (!models.length) await loadModels(); // somebody was quicker than the list
  const turn = { role: "assistant", model: $("model").value, text: "", reasoning: "", tokens: [] };
  const isKnown = typeof currentModel()?.chat === "boolean";
  turns.push(turn);
  setBusy(true);
  addTurn(turn);
  const polling = setInterval(showCache, 1000);
  try {
    await stream(turn, asked).catch(async (error) => {
      // Whether a model can chat may be known only once it is loaded: then what was refused goes as a plain text.
      if (isKnown || !(error instanceof ServerError) || turn.text) throw error;
      await loadModels();
      if (isChat()) throw error;
      await stream(turn, asked);
    });
  } catch (error) {
    if (error.name === "AbortError") turn.end = "stopped";
    else turn.error = error instanceof ServerError ? error.message : `The connection broke: ${error.message}.`;
  }
  clearInterval(polling);
  running = null;
  speak("", true);
  setBusy(false);
  drawTurn(turn);
  saveTurns();
  showCache();
  watchServer();
}

/** Sends the request and takes in what comes. Raises ServerError; AbortError when stopped. */
async function stream(turn, asked) {
  const started = performance.now();
  const { path, body } = request(asked);
  turn.chat = isChat();
  let isComplete = false;
  for await (const { comment, data } of events(await api(path, body, running.signal))) {
    if (comment !== undefined) showProgress(turn, comment);
    else if (data === "[DONE]") isComplete = true;
    else receive(turn, JSON.parse(data), (performance.now() - started) / 1000);
  }
  if (!isComplete) throw new ServerError("The connection broke before the answer was complete.");
}

/** Takes one chunk in; `now` is seconds since the question was sent. */
function receive(turn, chunk, now) {
  if (chunk.error) throw new ServerError(chunk.error.message);
  turn.usage = chunk.usage ?? turn.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const piece = choice.delta?.content ?? choice.text ?? "";
  const tokens = tokensOf(choice.logprobs);
  const thought = choice.delta?.reasoning ?? choice.delta?.reasoning_content ?? "";
  if (piece || thought || tokens.length) {
    turn.first ??= now;
    turn.seconds = now;
  }
  turn.text += piece;
  if (thought && !turn.reasoning) { // so was what came before it, a tag
    for (const token of turn.tokens) token.thought = true;
    views.get(turn).list = undefined;
  }
  turn.reasoning += thought;
  for (const token of tokens) token.thought = turn.reasoning !== "" && !turn.text;
  turn.tokens.push(...tokens);
  turn.end = choice.finish_reason ?? turn.end;
  speak(piece);
  drawSoon(turn);
}

/** The tokens of one chunk, whether of a chat or of a completion, as a chat has them. */
function tokensOf(logprobs) {
  if (!logprobs || logprobs.content) return logprobs?.content ?? [];
  const entries = (top) => Object.entries(top ?? {}).map(([token, logprob]) => ({ token, logprob }))
    .sort((a, b) => b.logprob - a.logprob).slice(0, TOP_OF_TEXTS); // the one that was chosen may come on top of these
  return logprobs.tokens.map((token, i) => (
    { token, logprob: logprobs.token_logprobs[i], top_logprobs: entries(logprobs.top_logprobs?.[i]) }));
}

/** Comments of the stream: "download NAME 5/80" (bytes), "load 40/100", "prefill 512/4096", "waiting". */
function showProgress(turn, comment) {
  const [kind, ...rest] = comment.split(" ");
  const [done, all] = (rest.at(-1) ?? "").split("/").map(Number);
  const part = all ? `${done.toLocaleString("en")} of ${all.toLocaleString("en")}` : "";
  const words = {
    load: `Loading ${[rest.length > 1 ? rest[0] : "the model", part].filter(Boolean).join(": ")}`,
    download: `Downloading ${rest[0]}: ${Math.floor(100 * done / all)} %`,
    prefill: `Reading the prompt: ${part} tokens`,
    waiting: "Waiting for other answers",
  }[kind];
  if (!words) return;
  setStatus("busy", { download: "Downloading", load: "Loading", prefill: "Reading", waiting: "Waiting" }[kind]);
  const line = all ? [el("progress", { value: done, max: all, ariaLabel: words })] : [];
  views.get(turn).progress.replaceChildren(text("span", words), ...line);
}

