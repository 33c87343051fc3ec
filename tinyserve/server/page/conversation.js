// ---- A turn on the page ----

let frame = null;
/** Draws at most once a frame, however fast tokens come. */
function drawSoon(turn) {
  frame ??= requestAnimationFrame(() => {
    frame = null;
    if (running) drawTurn(turn);
  });
}

function addTurn(turn) {
  const who = questions(turn) ? "You" : turn.model || "Answer";
  const view = {
    body: el("div", { className: "body" }), foot: el("div", { className: "foot" }), spans: [],
    progress: text("div", "Waiting for the first token", { className: "progress" }),
    thought: el("details", { className: "thought", hidden: true }, text("summary", ""), el("div", {})),
  };
  views.set(turn, view);
  $("welcome").hidden = true;
  const properties = { className: `turn ${turn.role}`, ariaLabel: who };
  $("talk").append(el("article", properties, text("h2", who), view.thought, view.body, view.foot));
  drawTurn(turn);
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function drawTurn(turn) {
  const view = views.get(turn);
  const scroll = $("scroll");
  const follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  const isRunning = running !== null && turn === turns.at(-1);
  if (questions(turn)) view.body.textContent = turn.text;
  else if (isRunning && turn.first === undefined) view.body.replaceChildren(view.progress);
  else if ($("glass").checked && turn.tokens.length) drawTokens(turn, view);
  else view.body.replaceChildren(...markdown(turn.text));
  drawThought(turn, view, isRunning);
  if (isRunning && turn.first !== undefined) setStatus("busy", "Answering");
  if (turn.error) view.body.append(text("p", turn.error, { className: "error", role: "alert" }));
  drawFoot(turn);
  if (!questions(turn)) show(turn);
  if (follows) scroll.scrollTop = scroll.scrollHeight;
}

/** What the model thought before it answered: folded, and no part of what is copied or sent back. */
function drawThought(turn, { thought }, isRunning) {
  thought.hidden = !turn.reasoning;
  thought.firstChild.textContent = isRunning && !turn.text ? "Thinking" : "Thought";
  thought.lastChild.textContent = turn.reasoning;
}

/** What can be done with a turn, and how an answer ended. */
function drawFoot(turn) {
  const quiet = (words, onclick) => button(words, onclick, "quiet");
  const isLast = turn === turns.at(-1);
  const list = [];
  if (questions(turn) && !running) list.push(quiet("Edit", () => edit(turn)));
  if (turn.text && !(isLast && running)) list.push(quiet("Copy", ({ target }) => copy(turn.text, target)));
  if (!questions(turn) && isLast && !running) {
    if (turn.error) list.push(button("Try again", regenerate));
    else list.push(quiet(turn.chat ? "Regenerate" : "Continue again", regenerate));
    if (!turn.chat && turn.text) list.push(quiet("Go on from here", goOn));
  }
  const hasTokens = !questions(turn) && !running && $("glass").checked && turn.tokens?.length > 0;
  if (hasTokens) {
    const picked = pickedOf(turn);
    list.push(quiet(`How was ${name(turn.tokens[picked])} chosen?`, () => explainToken(turn, pickedOf(turn))));
  }
  const notes = [{ length: "cut off at the most tokens", stopped: "stopped" }[turn.end]];
  const isPlain = turn.text && !turn.tokens?.length;
  if (!questions(turn) && !running && $("glass").checked && isPlain) notes.push("without probabilities");
  const note = notes.filter(Boolean).join(", ");
  views.get(turn).foot.replaceChildren(...list, note ? text("span", note, { className: "small" }) : "");
}

function redraw() {
  views.clear();
  hideCard();
  $("talk").replaceChildren();
  $("welcome").hidden = turns.length > 0;
  turns.forEach(addTurn);
  if (!turns.length) show(null);
}

let unspoken = "";
/** Sentences of a running answer go to screen readers once each, as they are complete. */
function speak(piece, isEnd = false) {
  unspoken += piece;
  const complete = isEnd ? unspoken : unspoken.match(/^[^]*[.!?:\n](?=\s)/)?.[0] ?? "";
  unspoken = unspoken.slice(complete.length);
  if (complete.trim()) $("spoken").append(text("p", complete.trim()));
}

// ---- Markdown: what small models write, and no more; never HTML ----

function markdown(source) {
  const blocks = [];
  const lines = source.split("\n");
  let open = null; // the block that the next line may belong to
  const begin = (block) => { blocks.push(open = block); };
  for (let i = 0; i < lines.length; i++) {
    const fence = lines[i].match(/^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/);
    const item = lines[i].match(/^\s*(?:[-*+]|(\d+)[.)])\s+(.*)/);
    const heading = lines[i].match(/^#{1,6}\s+(.*)/);
    if (fence) {
      const start = i + 1;
      while (++i < lines.length && !lines[i].trim().startsWith(fence[1]));
      begin(codeBlock(lines.slice(start, i).join("\n"), fence[2]));
    } else if (heading) {
      begin(el("p", {}, el("strong", {}, ...inline(heading[1]))));
    } else if (item) {
      const tag = item[1] ? "OL" : "UL";
      if (open?.tagName !== tag) begin(el(tag, item[1] ? { start: Number(item[1]) } : {}));
      open.append(el("li", {}, ...inline(item[2])));
    } else if (lines[i].trim() === "") {
      open = null;
    } else if (open?.tagName === "P") {
      open.append("\n", ...inline(lines[i]));
    } else {
      begin(el("p", {}, ...inline(lines[i])));
    }
  }
  return blocks;
}

function inline(source) {
  return source.split(/(`[^`]+`|\*\*[^*]+\*\*|\*[^\s*][^*]*\*)/).map((part, i) => {
    if (i % 2 === 0) return part;
    if (part.startsWith("`")) return text("code", part.slice(1, -1));
    return part.startsWith("**") ? text("strong", part.slice(2, -2)) : text("em", part.slice(1, -1));
  });
}

function codeBlock(source, language) {
  const copies = button("Copy", ({ target }) => copy(source, target), "quiet");
  return el("figure", { className: "code" }, el("figcaption", {}, text("span", language || "code"), copies),
    el("pre", { tabIndex: 0 }, text("code", source)));
}

