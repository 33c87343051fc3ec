"""The page in a real browser: against a server whose answers are written beforehand, and against the real one."""

import ast
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_openai_server import (
    LOADED,
    PARIS,
    Comment,
    Failure,
    FakeServer,
    Gate,
    Hangup,
    Raw,
    Refusal,
    Token,
)
from playwright.sync_api import Browser, Locator, Page, Route, expect
from servers import Running, running

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.models.config import parse_config
from tinyserve.models.inspection import inspection
from tinyserve.server.page import page as whole_page

PATIENCE = 120.0  # seconds: nothing here takes one, but for a machine that does something else
GPT2 = {**LOADED, "id": "gpt2", "chat": False, "max_model_len": 1024}

expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


Opener = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opener]:
    """Opens a page in a browser that knows nothing yet; in the end, none may have broken a rule or thrown an error."""
    contexts, wrong = [], []

    def watch(message: Any) -> None:
        # A refused request is in the console as well; that is no fault of the page.
        if message.type == "error" and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    def open_(url: str, width: int = 1280, height: int = 800, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", watch)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(open_page: Opener, fake: FakeServer) -> Page:
    return open_page(fake.url)


# --- What people see, by name ---------------------------------------------------------------------------------------


def question(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Your question")


def ask(page: Page, text: str) -> None:
    question(page).fill(text)
    question(page).press("Enter")


def answers(page: Page) -> Locator:
    return page.locator(".turn.assistant .body")


def tokens(page: Page) -> Locator:
    return page.get_by_role("listbox", name="Tokens").get_by_role("option")


def token(page: Page, text: str) -> Locator:
    return page.get_by_role("option", name=re.compile(rf"^{re.escape(text)},"))


def status(page: Page, text: str) -> None:
    expect(page.locator("#status")).to_have_text(text)


def open_pane(page: Page, name: str) -> None:
    summary = page.locator("#panel summary", has_text=name)
    summary.click()
    expect(summary.locator("..")).to_have_attribute("open", "")


def sent(fake: FakeServer) -> dict[str, Any]:
    """The last request's body."""
    return fake.requests[-1][1]


# --- The file -------------------------------------------------------------------------------------------------------


def test_the_file_is_self_contained_and_never_writes_markup() -> None:
    """One script, which the server lets run by its hash; nothing from elsewhere; no way for a text to become markup."""
    text = whole_page()
    assert text.count("<script") == text.count("<style") == 1 and "<script>" in text
    assert not re.search(r"\son[a-z]+=[\"']", text), "handlers in attributes are forbidden by the policy"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}


# --- A conversation -------------------------------------------------------------------------------------------------


def test_a_question_is_answered(page: Page, fake: FakeServer) -> None:
    ask(page, "What is the capital of France?")
    expect(answers(page)).to_have_text("The capital of France is Paris.")
    status(page, "Ready")
    expect(question(page)).to_have_value("")
    path, body = fake.requests[-1]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert body["logprobs"] is True and body["model"] == "smollm2-135m"


def test_a_question_may_come_before_the_list_of_models(open_page: Opener, fake: FakeServer) -> None:
    fake.models_gate.clear()
    page = open_page(fake.url)
    ask(page, "What is the capital of France?")
    expect(page.locator(".turn.user")).to_be_visible()
    fake.models_gate.set()
    expect(answers(page)).to_have_text("The capital of France is Paris.")
    assert sent(fake)["model"] == "smollm2-135m"


def test_the_next_question_has_the_conversation_before_it(page: Page, fake: FakeServer) -> None:
    ask(page, "What is the capital of France?")
    status(page, "Ready")
    fake.scripts.append([Token("Rome.")])
    ask(page, "And of Italy?")
    expect(answers(page).last).to_have_text("Rome.")
    assert [message["role"] for message in sent(fake)["messages"]] == ["user", "assistant", "user"]
    assert sent(fake)["messages"][1]["content"] == "The capital of France is Paris."


def test_shift_enter_begins_a_line_and_slash_goes_to_the_question(page: Page, fake: FakeServer) -> None:
    page.locator("#theme").focus()
    page.keyboard.press("/")
    expect(question(page)).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("t/wo")
    page.locator("#theme").focus()
    page.keyboard.press("Control+k")
    expect(question(page)).to_be_focused()
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("The capital of France is Paris.")
    assert sent(fake)["messages"][0]["content"] == "one\nt/wo"


def test_the_network_may_cut_the_stream_in_the_middle_of_a_character(page: Page, fake: FakeServer) -> None:
    event = 'data: {"choices": [{"delta": {"content": "Yes, é."}}]}\n\n'.encode()
    cut = event.index("é".encode()) + 1
    gate = Gate()
    fake.scripts.append([Raw(b": prefill 1/2\n\n" + event[:cut]), gate, Raw(event[cut:])])
    ask(page, "Is it?")
    expect(answers(page)).to_have_text("Reading the prompt: 1 of 2 tokens")
    gate.opened.set()
    expect(answers(page)).to_have_text("Yes, é.")


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_an_answer_is_stopped_and_what_there_is_stays(page: Page, fake: FakeServer, how: str) -> None:
    gate = Gate()
    fake.scripts.append([Token("Once"), Token(" upon"), gate, Token(" a time")])
    ask(page, "Tell me a story.")
    expect(answers(page)).to_have_text("Once upon")
    status(page, "Answering")
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn.assistant .foot")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(answers(page)).to_have_text("Once upon")
    assert gate.client_left.wait(PATIENCE), "the server must notice, or it goes on computing"


def test_an_answer_is_made_again(page: Page, fake: FakeServer) -> None:
    ask(page, "What is the capital of France?")
    expect(answers(page)).to_have_text("The capital of France is Paris.")
    status(page, "Ready")
    first = sent(fake)
    fake.scripts.append([Token("It is Paris.")])
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_have_text("It is Paris.")
    assert sent(fake) == first, "the old answer is not part of the new question"


def test_a_question_is_rewritten_or_left_as_it_was(page: Page, fake: FakeServer) -> None:
    for text in ("One", "Two"):
        ask(page, text)
        status(page, "Ready")
    page.locator(".turn.user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    expect(question(page)).to_have_value("One")
    page.keyboard.press("Escape")
    expect(question(page)).to_have_value("")
    expect(answers(page)).to_have_count(2)
    page.locator(".turn.user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    ask(page, "Three")
    expect(answers(page)).to_have_count(1)
    status(page, "Ready")
    assert [message["content"] for message in sent(fake)["messages"]] == ["Three"]


def test_settings_are_sent_and_empty_ones_are_not(page: Page, fake: FakeServer) -> None:
    open_pane(page, "Settings")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("")
    page.get_by_label("Min p").fill("0.05")
    page.get_by_label("Top k").fill("40")
    page.get_by_label("Stop", exact=True).fill("\n\n\nEND")
    ask(page, "Hello")
    status(page, "Ready")
    body = sent(fake)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["min_p"] == 0.05 and body["top_k"] == 40 and body["max_tokens"] == 512
    assert body["stop"] == ["END"]
    assert not body.keys() & {"temperature", "top_p", "seed", "repetition_penalty"}


def test_a_setting_that_is_no_number_is_pointed_at_and_nothing_is_sent(page: Page, fake: FakeServer) -> None:
    open_pane(page, "Settings")
    page.get_by_label("Temperature").fill("7")
    open_pane(page, "Answer")
    ask(page, "Hello")
    expect(page.get_by_label("Temperature")).to_be_focused()
    expect(answers(page)).to_have_count(0)
    assert fake.requests == []


def test_a_conversation_survives_a_reload_and_is_cleared(page: Page, fake: FakeServer) -> None:
    open_pane(page, "Settings")
    page.get_by_label("Seed").fill("7")
    ask(page, "What is the capital of France?")
    status(page, "Ready")
    page.reload()
    expect(answers(page)).to_have_text("The capital of France is Paris.")
    token(page, "Paris").hover()
    expect(page.locator("#card")).to_contain_text("93.0 %")
    expect(page.get_by_label("Seed")).to_have_value("7")
    page.get_by_role("button", name="Clear").click()
    expect(answers(page)).to_have_count(0)
    page.reload()
    expect(page.get_by_text("Ask something, and see how each word was chosen.")).to_be_visible()


def test_a_conversation_is_exported(page: Page) -> None:
    ask(page, "What is the capital of France?")
    status(page, "Ready")
    open_pane(page, "Settings")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export JSON").click()
    data = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert download.value.suggested_filename == "tinyserve-conversation.json"
    asked, answered = data["turns"]
    assert asked == {"role": "user", "text": "What is the capital of France?"}
    assert answered["text"] == "The capital of France is Paris." and answered["end"] == "stop"
    assert answered["tokens"][5]["token"] == " Paris" and len(answered["tokens"]) == len(PARIS)


def test_the_request_is_shown_as_curl_and_python(page: Page, fake: FakeServer) -> None:
    """Both say what the page itself sends, whatever is in the question."""
    open_pane(page, "Settings")
    page.get_by_label("Top k").fill("40")
    page.get_by_label("Temperature").fill("0.5")
    ask(page, "What's \"Paris\"? $HOME `ls` \\ {'a': None}\nline")
    status(page, "Ready")
    page.get_by_role("button", name="As curl or Python").click()
    curl, program = page.locator("#snippets code").all_text_contents()
    command = shlex.split(curl)
    assert command[:3] == ["curl", "-N", f"{fake.url}/v1/chat/completions"]
    assert json.loads(command[-1]) == sent(fake)
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    (create,) = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "create"]
    options = {word.arg: ast.literal_eval(word.value) for word in create.keywords}
    assert options.pop("extra_body") == {"top_k": 40}
    assert options | {"top_k": 40} == sent(fake)
    page.get_by_role("button", name="Close").click()
    expect(page.locator("#code-dialog")).to_be_hidden()


def test_themes_follow_the_system_until_one_is_chosen(open_page: Opener, fake: FakeServer) -> None:
    page = open_page(fake.url, color_scheme="dark")
    dark = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    page.get_by_role("button", name="Light").click()
    expect(page.locator("body")).not_to_have_css("background-color", dark)
    page.reload()
    expect(page.get_by_role("button", name="Dark")).to_be_visible()
    expect(page.locator("body")).not_to_have_css("background-color", dark)


# --- Text of a model ------------------------------------------------------------------------------------------------

MARKDOWN = """Use `print`, **not** <b>this</b>:

```python
if 1 < 2:
    print("<img src=x onerror=alert(1)>")
```

1. one
2. two
"""
ATTACK = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script> `<i>x</i>`"


def test_markdown_is_drawn_and_code_is_copied(open_page: Opener, fake: FakeServer) -> None:
    page = open_page(fake.url, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("switch", name="Glass box").click()
    fake.scripts.append([Token(part) for part in re.split(r"(?<=[ \n])", MARKDOWN)])
    ask(page, "How?")
    status(page, "Ready")
    assert "logprobs" not in sent(fake), "nobody looks at them"
    expect(answers(page).locator("p code")).to_have_text("print")
    expect(answers(page).locator("strong")).to_have_text("not")
    expect(answers(page).locator("ol li")).to_have_text(["one", "two"])
    expect(answers(page).locator("figcaption")).to_contain_text("python")
    expect(answers(page)).to_contain_text("<b>this</b>")
    answers(page).get_by_role("button", name="Copy").click()
    expect(answers(page).get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied == 'if 1 < 2:\n    print("<img src=x onerror=alert(1)>")'


THOUGHTS = [Token("<think>", shown=""), Token("Paris", shown="reasoning"), Token(", surely.", shown="reasoning")]


@pytest.mark.parametrize("glass", [True, False])
def test_what_was_thought_is_folded_and_not_copied(open_page: Opener, fake: FakeServer, glass: bool) -> None:
    page = open_page(fake.url, permissions=["clipboard-read", "clipboard-write"])
    if not glass:
        page.get_by_role("switch", name="Glass box").click()
    gate = Gate()
    fake.scripts.append([*THOUGHTS, gate, Token("</think>", shown=""), Token("It is"), Token(" Paris.")])
    ask(page, "Where?")
    thought = page.locator(".turn.assistant details.thought")
    expect(thought.locator("summary")).to_have_text("Thinking")
    expect(thought.locator("div")).to_be_hidden()
    thought.locator("summary").click()
    expect(thought.locator("div")).to_have_text("Paris, surely.")
    gate.opened.set()
    status(page, "Ready")
    expect(thought.locator("summary")).to_have_text("Thought")
    expect(thought.locator("div")).to_be_visible()
    expect(answers(page)).to_have_text("It is Paris.", use_inner_text=True)
    page.locator(".turn.assistant .foot").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == "It is Paris."
    ask(page, "And?")
    status(page, "Ready")
    assert sent(fake)["messages"][1] == {"role": "assistant", "content": "It is Paris."}
    page.reload()
    expect(page.locator(".turn.assistant").first.locator(".thought div")).to_have_text("Paris, surely.")


@pytest.mark.parametrize("glass", [True, False])
def test_markup_in_an_answer_stays_text(page: Page, fake: FakeServer, glass: bool) -> None:
    if not glass:
        page.get_by_role("switch", name="Glass box").click()
    fake.scripts.append([Token(ATTACK, 0.5, {"<b>other</b>": 0.4})])
    ask(page, ATTACK)
    status(page, "Ready")
    expect(answers(page)).to_contain_text("<img src=x onerror=")
    if glass:
        tokens(page).click()
        expect(page.locator("#card")).to_contain_text("<b>other</b>")
    assert page.locator("main img, main script, main b, #card b").count() == 0
    assert page.title() == "tinyserve"


def test_sentences_are_read_aloud_once_each(page: Page, fake: FakeServer) -> None:
    gate = Gate()
    fake.scripts.append([Token("One."), Token(" Two"), gate, Token("!")])
    ask(page, "Count.")
    aloud = page.get_by_role("log")
    expect(aloud.locator("p")).to_have_text(["One."])
    gate.opened.set()
    expect(aloud.locator("p")).to_have_text(["One.", "Two!"])


# --- The glass box --------------------------------------------------------------------------------------------------


def test_a_token_tells_its_probability_rank_and_alternatives(page: Page, fake: FakeServer) -> None:
    fake.scripts.append([Token("The", 0.9), Token(" answer", 0.04, {" city": 0.6, " capital": 0.3}), Token(".", 0.99)])
    ask(page, "What is the capital of France?")
    token(page, "answer").hover()
    card = page.locator("#card")
    expect(card).to_contain_text("rank 3, token 2")
    expect(card.locator("strong")).to_have_text("4.00 %")
    names = card.locator(".bar > span:first-child")
    expect(names).to_have_text(["␣city", "␣capital", "␣answer", "all others"])
    expect(card.locator(".bar > span:last-child")).to_have_text(["60.0 %", "30.0 %", "4.00 %", "6.00 %"])
    expect(card.locator(".chosen")).to_contain_text("␣answer")
    widths = card.locator(".bar i").evaluate_all("bars => bars.map((bar) => parseFloat(bar.style.width))")
    assert widths == pytest.approx([60, 30, 4, 6])
    heats = tokens(page).evaluate_all("tokens => tokens.map((token) => token.dataset.heat)")
    assert heats == ["0", "4", "0"]
    page.locator("h1").hover()
    expect(card).to_be_hidden()


def test_a_token_beyond_all_alternatives_has_no_rank(page: Page, fake: FakeServer) -> None:
    likelier = {f"w{i}": 0.1 for i in range(9)}  # the page asks for 6
    fake.scripts.append([Token("rare", 0.001, likelier)])
    ask(page, "Say something rare.")
    token(page, "rare").hover()
    expect(page.locator("#card")).to_contain_text("after rank 6")
    expect(page.locator("#card .chosen")).to_contain_text("0.10 %")


def test_arrow_keys_go_from_token_to_token(page: Page) -> None:
    ask(page, "What is the capital of France?")
    status(page, "Ready")
    options = tokens(page)
    options.first.focus()
    keys = [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 6), ("ArrowRight", 6), ("Home", 0)]
    for key, index in keys:
        page.keyboard.press(key)
        expect(options.nth(index)).to_be_focused()
        expect(page.locator("#card")).to_contain_text(f"token {index + 1}")
    expect(options.first).to_have_accessible_name(
        "The, 82.0 %, rank 1, not chosen: Paris 13.0 %, France 2.00 %, all others 3.00 %"
    )
    assert options.evaluate_all("tokens => tokens.filter((token) => token.tabIndex === 0).length") == 1


def test_characters_of_several_tokens_and_new_lines(page: Page, fake: FakeServer) -> None:
    """A part of a character shows its bytes, and the last part the character; nothing is shown twice."""
    parts = [Token("", raw=b"\xf0\x9f"), Token("", raw=b"\xa6"), Token("🦙", raw=b"\x99")]
    fake.scripts.append([Token("a\n\nb"), *parts, Token(" é")])
    ask(page, "A llama.")
    status(page, "Ready")
    assert tokens(page).all_text_contents() == ["a⏎\n⏎\nb", "F0 9F", "A6", "🦙", " é"]
    tokens(page).nth(1).hover()
    expect(page.locator("#card .chosen")).to_contain_text("F0 9F")
    tokens(page).nth(3).hover()
    expect(page.locator("#card .chosen")).to_contain_text("99")


def test_the_panel_tells_speed_cache_and_surprise(page: Page, fake: FakeServer) -> None:
    fake.cached_tokens = 32
    fake.stats["models"]["smollm2-135m"] = {
        "num_running": 1, "num_waiting": 2, "num_blocks": 512, "num_free_blocks": 384, "prompt_tokens": 200,
        "cached_tokens": 50, "cache_bytes": 188_743_680,
    }  # fmt: skip
    gate = Gate()
    fake.scripts.append([Token("a", 0.5), gate, Token("b", 0.25)])
    ask(page, "Hello")
    expect(page.locator("#cache")).to_have_text(
        "128 of 512 blocks (189 MB, taken only as used) in use by 1 answer, 2 waiting. "
        "Of 200 prompt tokens so far, 25.0 % came from the cache."
    )
    assert page.locator("#blocks").evaluate("bar => bar.value") == 0.25
    gate.opened.set()
    status(page, "Ready")
    expect(page.locator("#read")).to_have_text("37")
    expect(page.locator("#cached")).to_have_text("tokens read, 32 from the cache")
    expect(page.locator("#written")).to_have_text("2")
    expect(page.locator("#speed")).to_have_text(re.compile(r"^\d"))
    expect(page.locator("#first")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    expect(page.locator("#surprise")).to_contain_text("1.50 bits a token: as if it chose among 2.8 equal ones")
    heights = page.locator("#strip i").evaluate_all("bars => bars.map((bar) => parseFloat(bar.style.height))")
    assert heights == pytest.approx([12.5, 25])


@pytest.mark.parametrize("width", [400, 960, 1280])
def test_what_the_panel_tells_later_moves_no_pane_from_under_the_pointer(
    open_page: Opener, fake: FakeServer, width: int
) -> None:
    fake.cached_tokens = 1000
    counts = {"num_blocks": 12_345, "num_free_blocks": 1, "prompt_tokens": 1_234_567, "cached_tokens": 123_456}
    fake.stats = {"models": {}}
    page = open_page(fake.url, width=width)
    if page.locator("#panel-button").is_visible():
        page.locator("#panel-button").click()
    status(page, "Ready")
    summary = page.locator("#panel summary", has_text="Model")
    before = summary.bounding_box()
    assert before
    page.mouse.move(before["x"] + 20, before["y"] + 20)
    page.mouse.down()
    fake.stats = {"models": {"smollm2-135m": {"num_running": 16, "num_waiting": 64, "cache_bytes": 3 << 30, **counts}}}
    page.evaluate("showCache()")
    expect(page.locator("#cache")).to_contain_text("16 answers, 64 waiting")
    page.evaluate("""show({
      usage: { prompt_tokens: 1234, completion_tokens: 512, prompt_tokens_details: { cached_tokens: 1000 } },
      tokens: [{ logprob: -12.5 }], first: 12.34, seconds: 56.78 })""")
    expect(page.locator("#cached")).to_contain_text("1000 from the cache")
    expect(page.locator("#surprise")).to_contain_text("equal ones")
    assert summary.bounding_box() == before
    page.mouse.up()
    expect(page.locator("#pane-model")).to_have_attribute("open", "")


def report_of(name: str) -> dict[str, Any]:
    """What the server tells of the layers of a preset."""
    preset = presets.find(name)
    assert preset is not None
    return inspection(parse_config(preset.raw_config, "test"), ModelRef.parse(name), "test")


def test_the_map_says_what_is_kept_in_memory_as_the_server_says_it(page: Page, fake: FakeServer) -> None:
    kept = "int8 (w8a16): at most 8 bits; this file's 4 bits are kept, 97.0 MB"
    fake.inspections["smollm2-135m"] = report_of("smollm2-135m")
    fake.models[0] = {**LOADED, "weights": kept}
    page.reload()
    open_pane(page, "Model")
    expect(page.locator("#map")).to_contain_text(f"parameters; weights in {kept}.")
    fake.models[0] = {**LOADED, "weights": None}  # of one that is not loaded, its dtype tells
    page.reload()
    expect(page.locator("#map")).to_contain_text(re.compile(r"parameters; \d+ MB of weights in int8\."))


def test_the_layer_map_of_a_hybrid(page: Page, fake: FakeServer) -> None:
    fake.inspections["smollm2-135m"] = report = report_of("granite-350m")
    open_pane(page, "Model")
    rows = page.locator(".layers li")
    expect(rows).to_have_count(32)
    expect(page.locator("#map")).to_contain_text("340 M parameters; 352 MB of weights in int8.")
    kinds = rows.locator("i:first-of-type").evaluate_all("bars => bars.map((bar) => bar.dataset.part)")
    assert kinds == report["layer_types"]
    rows.nth(10).hover()
    expect(page.locator("#map")).to_contain_text("Layer 11: Attention 1.6 M + MLP 4.7 M, about 6.5 MB")
    mlp = page.locator(".parts tr", has_text="MLP")
    expect(mlp).to_have_text("MLP151 M44.4 %156 MB")


# --- Models ---------------------------------------------------------------------------------------------------------


def test_loading_and_reading_are_shown(page: Page, fake: FakeServer) -> None:
    loading, reading = Gate(), Gate()
    script = [Comment("load smollm2-135m 40/100"), loading, Comment("prefill 512/4096"), reading, Token("Hello")]
    fake.scripts.append(script)
    ask(page, "Hi")
    expect(answers(page)).to_have_text("Loading smollm2-135m: 40 of 100")
    assert answers(page).get_by_role("progressbar").evaluate("bar => bar.value / bar.max") == 0.4
    status(page, "Loading")
    loading.opened.set()
    expect(answers(page)).to_have_text("Reading the prompt: 512 of 4,096 tokens")
    reading.opened.set()
    expect(answers(page)).to_have_text("Hello")


def test_a_model_is_picked_and_remembered(page: Page, fake: FakeServer) -> None:
    fake.models.append({**LOADED, "id": "granite-350m", "loaded": False, "chat": None})
    page.reload()
    page.get_by_label("Model").select_option("granite-350m")
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("granite-350m")
    ask(page, "Hi")
    status(page, "Ready")
    assert sent(fake)["model"] == "granite-350m"


def test_a_model_without_a_chat_template_goes_on_with_a_text(open_page: Opener, fake: FakeServer) -> None:
    fake.models = [dict(GPT2)]
    page = open_page(fake.url)
    expect(page.locator("#notice")).to_have_text(
        "gpt2 has no chat template: it goes on with your text, and answers no questions."
    )
    text = page.get_by_role("textbox", name="Continue this text")
    fake.scripts.append([Token(" Paris", 0.3, {" the": 0.4})])
    text.fill("The capital of France is")
    text.press("Enter")
    expect(answers(page)).to_have_text("Paris")
    status(page, "Ready")
    path, body = fake.requests[-1]
    assert path == "/v1/completions" and body["prompt"] == "The capital of France is" and body["logprobs"] == 5
    tokens(page).hover()
    expect(page.locator("#card")).to_contain_text("rank 2")
    page.get_by_role("button", name="Go on from here").click()
    expect(answers(page)).to_have_count(2)
    status(page, "Ready")
    assert sent(fake)["prompt"] == "The capital of France is Paris"


@pytest.mark.parametrize("late", [False, True])
def test_that_a_model_cannot_chat_may_be_known_only_when_it_is_loaded(
    open_page: Opener, fake: FakeServer, late: bool
) -> None:
    """Refused at once, or as the stream's last event after it was loaded."""
    fake.models = [{**GPT2, "loaded": False, "chat": None}]
    page = open_page(fake.url)
    status(page, "Ready")
    gate = Gate()
    message = "gpt2 has no chat template."
    fake.scripts.append([Comment("load gpt2"), gate, Failure(message)] if late else Refusal(400, message))
    fake.scripts.append([Token(" Paris")])
    fake.models = [dict(GPT2)]
    question(page).fill("The capital of France is")
    question(page).press("Enter")
    gate.opened.set()
    expect(answers(page)).to_have_text("Paris")
    assert [path for path, _ in fake.requests] == ["/v1/chat/completions", "/v1/completions"]


# --- What goes wrong ------------------------------------------------------------------------------------------------


def test_a_refusal_is_told_and_tried_again(page: Page, fake: FakeServer) -> None:
    fake.scripts.append(Refusal(503, "The queue is full.", {"Retry-After": "7"}))
    ask(page, "What is the capital of France?")
    expect(page.get_by_role("alert")).to_contain_text("The queue is full. It asks to wait 7 seconds.")
    page.get_by_role("button", name="Try again").click()
    expect(answers(page)).to_have_text("The capital of France is Paris.")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_question_without_an_answer_is_no_part_of_the_next(page: Page, fake: FakeServer) -> None:
    fake.scripts.append(Refusal(400, "No."))
    ask(page, "Bad")
    expect(page.get_by_role("alert")).to_contain_text("No.")
    ask(page, "Good")
    expect(answers(page).last).to_have_text("The capital of France is Paris.")
    assert [message["content"] for message in sent(fake)["messages"]] == ["Good"]


def test_a_list_of_models_that_comes_late_ends_no_answer(page: Page, fake: FakeServer) -> None:
    """An answer's end asks for it; by then the next question may have been asked."""
    status(page, "Ready")
    late: list[Route] = []
    page.route("**/v1/models", lambda route: late.append(route))  # Playwright sets an attribute of it
    with page.expect_request("**/v1/models"):
        ask(page, "First")
    gate = Gate()
    fake.scripts.append([Token("Second"), gate, Token(" answer.")])
    ask(page, "And?")
    status(page, "Answering")
    with page.expect_response("**/v1/models"):
        for route in late:
            route.continue_()
    page.unroute("**/v1/models")
    page.evaluate("() => new Promise(requestAnimationFrame)")
    status(page, "Answering")
    gate.opened.set()
    expect(answers(page).last).to_have_text("Second answer.")
    status(page, "Ready")


@pytest.mark.parametrize(
    "end, message",
    [(Failure("The model ran out of memory."), "The model ran out of memory."), (Hangup(), "The connection broke")],
)
def test_an_answer_that_breaks_off_keeps_its_beginning(page: Page, fake: FakeServer, end: Any, message: str) -> None:
    fake.scripts.append([Token("Once"), end])
    ask(page, "Tell me a story.")
    expect(page.get_by_role("alert")).to_contain_text(message)
    expect(answers(page)).to_contain_text("Once")
    ask(page, "Tell me another.")
    status(page, "Ready")
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)  # it would take the new answer away


def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(open_page: Opener, fake: FakeServer) -> None:
    fake.key = "secret"
    page = open_page(fake.url)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This server wants an API key.")
    dialog.get_by_label("API key").last.fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_label("API key").last).to_have_value("")  # asked once more
    dialog.get_by_label("API key").last.fill("secret")
    page.keyboard.press("Enter")
    status(page, "Ready")
    page.reload()
    ask(page, "What is the capital of France?")
    expect(answers(page)).to_have_text("The capital of France is Paris.")
    assert page.evaluate("() => JSON.stringify(localStorage)").count("secret") == 0
    open_pane(page, "Settings")
    page.get_by_role("button", name="Forget the API key").click()
    page.reload()
    expect(dialog).to_be_visible()
    dialog.get_by_role("button", name="Cancel").click()
    status(page, "The server wants an API key")


def test_a_server_that_dies_is_noticed_and_so_is_its_return(open_page: Opener) -> None:
    first = FakeServer()
    page = open_page(first.url)
    status(page, "Ready")
    first.close()
    status(page, "The server does not answer")
    ask(page, "Are you there?")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer. Is tinyserve serve still running?")
    second = FakeServer(first.port)
    try:
        status(page, "Ready")
        page.get_by_role("button", name="Try again").click()
        expect(answers(page)).to_have_text("The capital of France is Paris.")
    finally:
        second.close()


# --- Small windows --------------------------------------------------------------------------------------------------


def test_a_phone_shows_everything_without_sideways_scrolling(open_page: Opener, fake: FakeServer) -> None:
    page = open_page(fake.url, 360, 740, has_touch=True, is_mobile=True)
    fake.scripts.append([*PARIS, Token("\n```\n" + "x" * 300 + "\n```")])
    ask(page, "What is the capital of France? " + "y" * 200)
    status(page, "Ready")
    token(page, "Paris").tap()
    expect(page.locator("#card")).to_contain_text("93.0 %")
    page.get_by_role("button", name="Inside").click()
    open_pane(page, "Settings")
    expect(page.get_by_label("Temperature")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_label("Temperature")).to_be_hidden()
    page.locator("label.switch").tap()
    expect(answers(page).locator("pre")).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360


# --- The real server ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Running]:
    """The default model, served."""
    with running({"smollm2-135m": smollm2}, max_model_len=2048, max_num_seqs=4) as one:
        yield one


def ask_without_luck(page: Page, text: str) -> None:
    """Ask so that the answer is the same each time."""
    open_pane(page, "Settings")
    page.get_by_label("Temperature").fill("0")
    open_pane(page, "Answer")
    ask(page, text)


def answered(page: Page) -> Page:
    """The page once it is told what the capital of France is."""
    ask_without_luck(page, "What is the capital of France?")
    expect(answers(page)).to_contain_text("The capital of France is Paris.")
    status(page, "Ready")
    return page


def test_a_real_model_answers_and_its_tokens_can_be_looked_into(open_page: Opener, server: Running) -> None:
    page = answered(open_page(server.url))
    token(page, "Paris").hover()
    card = page.locator("#card")
    expect(card).to_contain_text("rank 1, token 6")
    expect(card.locator(".bar")).to_have_count(7)  # six, and all others
    shares = card.locator(".bar i").evaluate_all("bars => bars.map((bar) => parseFloat(bar.style.width))")
    assert sum(shares) == pytest.approx(100, abs=0.01) and shares[0] == max(shares)
    expect(tokens(page).last.locator(".chip")).to_have_text("<|im_end|>")
    expect(page.locator("#read")).to_have_text("37")
    expect(page.locator("#cache")).to_contain_text(re.compile(r"^0 of \d+ blocks"))


def test_it_is_shown_how_a_token_came_to_be(open_page: Opener, server: Running) -> None:
    page = answered(open_page(server.url))
    token(page, "Paris").click()
    page.get_by_role("button", name="How was ␣Paris chosen?").click()
    inside = page.frame_locator("iframe[title=Explanation]")
    expect(inside.locator("#lens tr")).to_have_count(1 + 1 + 30)
    expect(inside.locator("#lens tr").last).to_contain_text("Paris")
    expect(inside.locator("#sampling tr").last).to_contain_text("Paris")
    expect(inside.locator("#heads canvas")).to_have_count(9)
    expect(inside.get_by_role("group", name="Tokens").get_by_role("button").last).to_contain_text("is")
    page.keyboard.press("Escape")
    expect(page.locator("iframe")).to_have_count(0)


def test_a_real_model_is_stopped(open_page: Opener, server: Running) -> None:
    page = open_page(server.url)
    before = server.engine.stats().output_tokens
    ask_without_luck(page, "Write a very long story about a lighthouse and all the ships it has seen.")
    expect(tokens(page).nth(2)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".turn.assistant .foot")).to_contain_text("stopped")
    expect(page.locator("#cache")).to_contain_text("in use by 0 answers")
    assert 3 <= server.engine.stats().output_tokens - before < 512, "it went on to the most tokens"
    ask(page, "What is the capital of France?")  # what is said to that depends on how far the story came
    expect(answers(page)).to_have_count(2)
    expect(answers(page).last.get_by_role("option").nth(2)).to_be_visible()


def test_a_real_model_shows_its_layers_and_what_it_refuses(open_page: Opener, server: Running) -> None:
    page = open_page(server.url)
    open_pane(page, "Model")
    expect(page.locator(".layers li")).to_have_count(30)
    expect(page.locator("#map")).to_contain_text("135 M parameters")
    ask(page, "word " * 3000)
    expect(page.get_by_role("alert")).to_contain_text("2048")
