// ---- What people do ----

function send(words) {
  if (running || !words.trim() || !areFieldsRight()) return;
  if (editing) turns.splice(turns.indexOf(editing));
  if (editing) redraw();
  stopEditing();
  turns.push({ role: "user", text: words });
  addTurn(turns.at(-1));
  answer();
}

function areFieldsRight() {
  const wrong = FIELDS.map(({ name }) => $(name)).find((input) => !input.checkValidity());
  if (!wrong) return true;
  openPanel(true);
  $("pane-settings").open = true;
  wrong.reportValidity();
  return false;
}

function regenerate() {
  if (running || !areFieldsRight()) return;
  turns.pop();
  redraw();
  answer();
}

/** Of a model that only continues: its text becomes the beginning of the next. */
function goOn() {
  const [before, after] = turns.slice(-2);
  send(before.text + after.text);
}

function edit(turn) {
  editing = turn;
  $("prompt").value = turn.text;
  $("prompt").focus();
  $("notice").hidden = false;
  $("notice").textContent = "You rewrite an earlier question. Sending it takes back what came after; Esc leaves it.";
}
function stopEditing() {
  editing = null;
  $("prompt").value = "";
  showModel(); // and its notice
}

function clear() {
  running?.abort();
  turns = [];
  saveTurns();
  stopEditing();
  redraw();
  openPanel(false);
  $("prompt").focus();
}

function setBusy(isBusy) {
  $("send").textContent = isBusy ? "Stop" : "Send";
  $("model").disabled = $("clear").disabled = isBusy;
  if (isBusy) $("spoken").replaceChildren();
  if (isBusy) setStatus("busy", "Asking");
  [...views.keys()].forEach(drawFoot);
}

function openPanel(isOpen) {
  $("panel").classList.toggle("open", isOpen);
  $("panel-button").ariaExpanded = isOpen;
  $("panel-button").textContent = isOpen ? "Close" : "Inside";
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const isDark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  $("theme").textContent = isDark ? "Light" : "Dark";
  $("theme").onclick = () => { set("theme", isDark ? "light" : "dark"); setTheme(settings.theme); };
}

function escape() {
  if (running) running.abort();
  else if (!$("card").hidden) hideCard();
  else if (editing) stopEditing();
  else openPanel(false);
}

function shortcut(event) {
  if (document.querySelector("dialog[open]")) return;
  const isWriting = event.target.matches("input, textarea, select");
  if (event.key === "Escape") escape();
  if ((event.key === "/" && !isWriting) || (event.key === "k" && (event.ctrlKey || event.metaKey))) {
    event.preventDefault();
    $("prompt").focus();
  }
}

// ---- Beginning ----

function buildFields() {
  for (const { name, label, hint, isText, value = "", ...limits } of FIELDS) {
    const own = { id: name, value: settings[name] ?? value, "aria-describedby": `${name}-hint` };
    const numeric = { type: "number", placeholder: "default", ...limits };
    const input = isText ? el("textarea", { rows: 2, ...own }) : el("input", { ...numeric, ...own });
    input.onchange = () => set(name, input.value);
    $("fields").append(el("div", { className: "field" },
      text("label", label, { htmlFor: name }), input, text("small", hint, { id: `${name}-hint` })));
  }
  for (const legend of document.querySelectorAll(".legend")) {
    legend.append(...HEATS.map(([, words], i) => text("span", words, { className: "token", "data-heat": i })));
  }
}

function listenToTokens() {
  const talk = $("talk");
  const tokenAt = ({ target }) => target.closest(".token");
  talk.onpointerover = (event) => {
    if (event.pointerType === "touch") return; // a tap is a click
    if (tokenAt(event)) showCard(tokenAt(event));
    else hideCard();
  };
  talk.onpointerleave = (event) => { if (event.pointerType !== "touch") hideCard(); };
  talk.onclick = (event) => {
    const span = tokenAt(event);
    if (!span) return;
    focusToken(span);
    pick(span);
  };
  talk.onkeydown = (event) => { if (placeOf.has(event.target)) tokenKey(event); };
  talk.addEventListener("focusin", ({ target }) => { if (placeOf.has(target)) showCard(target); });
  talk.addEventListener("focusout", hideCard);
  $("strip").onpointerover = ({ target }) => {
    const span = views.get(shown)?.spans[[...$("strip").children].indexOf(target)];
    span?.scrollIntoView({ block: "nearest" });
    if (span) showCard(span);
  };
  $("strip").onpointerleave = hideCard;
}

function listen() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send($("prompt").value);
  };
  $("prompt").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send($("prompt").value);
  };
  $("glass").onchange = () => { set("glass", $("glass").checked); redraw(); };
  $("model").onchange = () => { set("model", $("model").value); showModel(); showCache(); };
  $("system").onchange = () => set("system", $("system").value);
  $("panel-button").onclick = () => openPanel(!$("panel").classList.contains("open"));
  $("code").onclick = () => { $("snippets").replaceChildren(...snippets()); $("code-dialog").showModal(); };
  $("forget").onclick = () => setKey(null);
  $("export").onclick = exportJson;
  $("clear").onclick = clear;
  for (const pane of document.querySelectorAll("#panel details")) {
    pane.open = pane.id === (settings.pane ?? "pane-answer");
    pane.ontoggle = () => {
      if (pane.open) set("pane", pane.id);
      showModel();
    };
  }
  document.onkeydown = shortcut;
  window.onpagehide = () => {
    if (running) turns.at(-1).end = "stopped";
    saveTurns();
  };
}

buildFields();
$("glass").checked = settings.glass ?? true;
$("system").value = settings.system ?? "";
$("forget").hidden = apiKey === null;
setTheme(settings.theme);
listenToTokens();
listen();
redraw();
loadModels().then(showCache);
setInterval(() => {
  if (document.hidden) return;
  watchServer();
  showCache(); // other clients use it, too
}, 5000);
if (matchMedia("(hover: hover)").matches) $("prompt").focus(); // elsewhere a keyboard would cover the page
