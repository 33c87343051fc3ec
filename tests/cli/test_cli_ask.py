"""`ask` and `chat`: where the prompt and the model come from, what goes to which stream, and how each run ends."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import checkpoints
import pytest
from command_line import PROGRAM, Children, Shell, Terminal, environment, run

from tinyserve import LLM, SamplingParams, loading
from tinyserve.checkpoints.hub import cache
from tinyserve.checkpoints.model_ref import names_a_model
from tinyserve.cli._answer import read_prompt
from tinyserve.errors import UserError

FolderOf = Callable[[str], Path]
# A long context, and no end token: an answer that goes on until somebody stops it.
ENDLESS = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 200_000, "eos_token_id": None}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 without a chat template, as the real one."""
    folder = checkpoints.write_folder(tmp_path_factory.mktemp("plain") / "model", checkpoints.CONFIGS["gpt2"])
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|eos|>"}')
    return warm(folder)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose template says who speaks."""
    folder = checkpoints.write_folder(tmp_path_factory.mktemp("chatty") / "model", checkpoints.CONFIGS["llama"])
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|bos|>", "chat_template": template}))
    return warm(folder)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends by itself."""
    folder = checkpoints.write_folder(tmp_path_factory.mktemp("endless") / "model", ENDLESS)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": checkpoints.CHAT_TEMPLATE}))
    return warm(folder)


def warm(folder: Path) -> Path:
    """The folder of a model whose kernels are compiled, so that nothing is said about that."""
    LLM(folder, kv_cache_memory=1 << 24).generate("Hi", SamplingParams(max_tokens=2))
    return folder


def ids(shell: Shell, *arguments: str | Path, stdin: str = "") -> list[int]:
    result = shell("ask", *arguments, "--json", stdin=stdin)
    assert result.code == 0, result.err
    found: list[int] = json.loads(result.out)["token_ids"]
    return found


# --- the model and the prompt ---------------------------------------------------------------------------------------


def test_options_stand_before_or_after(shell: Shell, plain: Path) -> None:
    (expected,) = LLM(plain).generate("Hello", SamplingParams(temperature=0, max_tokens=6))
    wanted = expected.outputs[0].token_ids
    assert ids(shell, plain, "Hello", "--max-tokens", "6") == wanted
    assert ids(shell, "--max-tokens", "6", plain, "Hello") == wanted
    assert ids(shell, plain, "--max-tokens", "6", "Hello") == wanted
    assert ids(shell, "--model", plain, "Hello", "--max-tokens", "6") == wanted
    assert ids(shell, plain, "--max-tokens", "6", stdin="Hello") == wanted
    assert ids(shell, plain, "-", "--max-tokens", "6", stdin="Hello") == wanted
    assert ids(shell, plain, "--max-tokens", "6", stdin="\ufeffHello") == wanted  # as PowerShell writes it
    assert ids(shell, "-m", plain, "--max-tokens", "6", stdin="Hello") == wanted


def test_what_is_piped_in_is_behind_the_prompt(shell: Shell, plain: Path) -> None:
    joined = ids(shell, plain, "Sum up:\n\nabc\ndef\n", "--max-tokens", "6")
    assert ids(shell, plain, "Sum up:", "--max-tokens", "6", stdin="abc\ndef\n") == joined
    assert ids(shell, plain, "Sum up:", "--max-tokens", "6", stdin="\ufeffabc\ndef\n") == joined
    alone = ids(shell, plain, "Sum up:", "--max-tokens", "6")
    for nothing in ("", "\n", " \n\ufeff"[:2]):
        assert ids(shell, plain, "Sum up:", "--max-tokens", "6", stdin=nothing) == alone
    assert "not UTF-8" in shell("ask", plain, "Sum up:", stdin=b"caf\xe9").sentence


def test_without_standard_input_a_prompt_is_a_prompt(shell: Shell, plain: Path, monkeypatch: Any) -> None:
    """Closed (<&-), or none, as for a service."""
    for stdin in (None, io.TextIOWrapper(io.BytesIO(b"x"))):
        if stdin is not None:
            stdin.close()
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_prompt("Hello", "m") == "Hello"
        with pytest.raises(UserError, match="There is no prompt for m"):
            read_prompt(None, "m")


def test_a_lone_prompt_goes_to_the_default_model(shell: Shell, tmp_path: Path, monkeypatch: Any) -> None:
    gguf = checkpoints.write_model_gguf(tmp_path / "model.gguf", checkpoints.CONFIGS["llama"])
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "default_gguf", lambda: gguf)
    named = ids(shell, "smollm2-135m", "Who are you?", "--max-tokens", "5")
    assert ids(shell, "Who are you?", "--max-tokens", "5") == named
    assert ids(shell, "--max-tokens", "5", "Who are you?") == named
    assert ids(shell, "smollm2", "Who are you?", "--max-tokens", "5") == named
    assert ids(shell, "--max-tokens", "5", "smollm2", "Who are you?") == named
    assert ids(shell, "-m", "135m", "smollm2", "Who are you?", "--max-tokens", "5") == named
    assert ids(shell, "smollm2", "-m", "smollm2-135m", "Who are you?", "--max-tokens", "5") == named
    assert ids(shell, "--max-tokens", "5", stdin="Who are you?") == named
    assert ids(shell, "-", "--max-tokens", "5", stdin="Who are you?") == named
    said = shell("ask", "Who are you?", "--max-tokens", "5")
    assert said.err.startswith("[smollm2-135m · ")  # who has answered


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("gpt2", True), ("smollm2-135m", True), ("smollm2-135m@main", True), ("owner/name", True),
        ("model.gguf", True), ("./folder", True), ("/", True), ("Hello", False), ("Is 1/2 more than 1/3?", False),
        ("What is the capital of France?", False), ("-", False), ("", False), ("gpt2@ is old", False),
        ("and/or", True), ("a/b/c/d", True), ("~nobody/at/all", True), ("...", False), ("owner/name@v 1", False),
        ("x" * 5000, False),
    ],
)  # fmt: skip
def test_which_words_are_models(word: str, expected: bool) -> None:
    assert names_a_model(word) is expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("gpt2", "--model", "huge", "hi"), "gpt2 has no variant 'huge'; there are tiny, small, medium, large, xl."),
        (("--model", "huge", "gpt2", "hi"), "gpt2 has no variant 'huge'; there are tiny, small, medium, large, xl."),
        (("--model", "gpt2", "smollm2-135m", "hi"), "The model is given twice"),
        (("gpt2", "hi", "--max-tokens", "0"), "max_tokens is 0; it must be"),
        (("gpt2", "hi", "--max-tokens", "-1"), "max_tokens is -1; it must be"),
        (("gpt2", "hi", "--temp", "-0.5"), "temperature is -0.5; it must be"),
        (("gpt2", "hi", "--temperature", "nan"), "temperature is nan"),
        (("gpt2", "hi", "--top-p", "0"), "top_p is 0.0; it must be"),
        (("gpt2", "hi", "--top-p", "1.5"), "top_p is 1.5"),
        (("gpt2", "hi", "--top-k", "-2"), "top_k is -2"),
        (("gpt2", "hi", "--min-p", "2"), "min_p is 2.0; it must be"),
        (("gpt2", "hi", "--stop", ""), "stop is ('',); it must be"),
        (("gpt2", "hi", "--dtype", "int9"), "Did you mean 'int8'?"),
        (("gpt2", "hi", "--dtype", "flaot32"), "Did you mean 'float32'?"),
        (("gpt2", "hi", "--threads", "0"), "--threads is 0; it must be at least 1."),
        (("gpt2", "hi", "--raw", "--chat-template", "x.jinja"), "leave out --raw, or --chat-template"),
        (("gpt2", ""), "The prompt is empty"),
        (("gpt2", " \n"), "The prompt is empty"),
        (("gpt2",), "The prompt is empty"),  # standard input is
        (("gpt2", "-"), "The prompt is empty"),
        ((), "The prompt is empty"),
        (("gpt2", "a\udcff"), "not UTF-8"),  # what Python makes of such a byte in a command line
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    shell: Shell, arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_files(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was looked for")

    monkeypatch.setattr("tinyserve.loading.open_model", no_files)
    result = shell("ask", *arguments)
    assert result.code == 2
    assert says in result.sentence


def test_what_only_the_model_knows_is_wrong(shell: Shell, plain: Path) -> None:
    long = shell("ask", plain, "x" * 200)
    assert long.code == 2
    assert "200 tokens" in long.sentence and "128" in long.sentence
    assert "200 tokens" in shell("ask", plain, stdin="x" * 200).sentence
    exact = shell("ask", plain, "x" * 128)
    assert "128 tokens" in exact.sentence
    assert shell("ask", plain, "x" * 127).code == 0
    system = shell("ask", plain, "hi", "--system", "Be brief.")
    assert system.code == 2
    assert system.sentence == f"--system needs a chat template, which {plain} does not have (or --raw turns off)."
    assert "not UTF-8" in shell("ask", plain, stdin=b"caf\xe9").sentence


def test_a_terminal_without_a_prompt_is_told_so(plain: Path) -> None:
    with Terminal("ask", plain) as terminal:
        assert terminal.end() == 2
        assert f"tinyserve: There is no prompt for {plain}" in terminal.shown.replace("\n", "")
    with Terminal("ask") as terminal:
        assert terminal.end() == 0
        assert terminal.shown.startswith("Usage: tinyserve ask")


# --- the answer -----------------------------------------------------------------------------------------------------


def test_streams(shell: Shell, plain: Path) -> None:
    """The answer and nothing else on stdout, the statistics on stderr."""
    (expected,) = LLM(plain).generate("Hello", SamplingParams(temperature=0, max_tokens=9))
    loud = shell("ask", plain, "Hello", "--max-tokens", "9")
    assert loud.out == expected.outputs[0].text + "\n"
    assert re.fullmatch(
        r"\[.* · load \d+\.\d\d s · prefill 5 tokens at \d+/s · first token after \d+\.\d\d s · 9 tokens at \d+/s · "
        r"w8a16, \d+ threads? · cut off at --max-tokens 9\]\n",
        loud.err,
    )
    quiet = shell("ask", plain, "Hello", "--max-tokens", "9", "--quiet")
    assert (quiet.out, quiet.err) == (loud.out, "")
    full = shell("ask", plain, "x" * 120)
    assert full.err.endswith("cut off where the context is full]\n")


def test_json_is_one_object(shell: Shell, plain: Path) -> None:
    result = shell("ask", plain, "Hello", "--max-tokens", "9", "--json")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("\n") == 1
    report = json.loads(result.out)
    (expected,) = LLM(plain).generate("Hello", SamplingParams(temperature=0, max_tokens=9))
    assert report["model"] == str(plain)
    assert report["text"] == expected.outputs[0].text
    assert report["token_ids"] == expected.outputs[0].token_ids
    assert (report["prompt_tokens"], report["output_tokens"], report["finish_reason"]) == (5, 9, "length")
    assert (report["dtype"], report["threads"] >= 1) == ("w8a16", True)
    for name in (
        "load_seconds",
        "prefill_tokens_per_second",
        "time_to_first_token_seconds",
        "decode_tokens_per_second",
    ):
        assert report[name] > 0
    one = json.loads(shell("ask", plain, "Hello", "--max-tokens", "1", "--json").out)
    assert one["decode_tokens_per_second"] is None


def test_templates_system_and_raw(shell: Shell, chatty: Path) -> None:
    llm = LLM(chatty)
    params = SamplingParams(temperature=0, max_tokens=6)
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
    options = ("Hi", "--max-tokens", "6")
    assert ids(shell, chatty, *options) == llm.chat([user], params)[0].outputs[0].token_ids
    assert (
        ids(shell, chatty, *options, "--system", "Be brief.")
        == llm.chat([system, user], params)[0].outputs[0].token_ids
    )
    assert ids(shell, chatty, *options, "--raw") == llm.generate("Hi", params)[0].outputs[0].token_ids
    both = shell("ask", chatty, "Hi", "--raw", "--system", "Be brief.")
    assert both.code == 2
    assert "--raw" in both.sentence


def test_a_chat_template_of_ones_own(shell: Shell, plain: Path, chatty: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[-1].content }}!")
    expected = LLM(plain).generate("Hi!", SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].token_ids
    assert ids(shell, plain, "Hi", "--max-tokens", "6", "--chat-template", file) == expected
    assert shell("chat", plain, "--max-tokens", "2", "--chat-template", file, stdin="Hi\n").code == 0
    file.write_text("\n{{ messages[")
    for command in (("ask", chatty, "Hi"), ("chat", chatty)):
        result = shell(*command, "--chat-template", file)
        assert result.code == 2
        assert result.sentence.startswith(f"The chat template of {file} is no valid Jinja at line 2: ")


def test_a_model_with_a_broken_template_continues_text(shell: Shell, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path / "model", checkpoints.CONFIGS["llama"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% audio %}"}))
    for command in ("ask", "chat"):
        result = shell(command, folder, stdin="Hi\n")
        assert "no valid Jinja at line 1: Encountered unknown tag 'audio'" in result.err and "ask --raw" in result.err
    assert shell("ask", folder, "Hi", "--raw", "--max-tokens", "2").code == 0


def test_a_seed_makes_chance_repeatable(shell: Shell, plain: Path) -> None:
    options = ("Hello", "--temp", "1", "--max-tokens", "12")
    first = ids(shell, plain, *options, "--seed", "3")
    assert ids(shell, plain, *options, "--seed", "3") == first
    assert ids(shell, plain, *options, "--seed", "4") != first
    greedy = ids(shell, plain, "Hello", "--max-tokens", "12")
    assert ids(shell, plain, *options, "--seed", "3", "--top-k", "1") == greedy
    assert ids(shell, plain, *options, "--seed", "3", "--top-p", "0.0001") == greedy
    assert ids(shell, plain, *options, "--seed", "3", "--min-p", "1") == greedy


def test_stop_texts_end_the_answer_and_are_not_in_it(shell: Shell, plain: Path) -> None:
    whole = shell("ask", plain, "Hello", "--max-tokens", "40", "--quiet").out[:-1]
    stop = next(c for c in whole[3:] if c.isprintable() and c != "�")
    report = json.loads(
        shell("ask", plain, "Hello", "--max-tokens", "40", "--stop", "never", "--stop", stop, "--json").out
    )
    assert report["text"] == whole[: whole.index(stop)]
    assert report["finish_reason"] == "stop"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "w8a16"])
def test_dtypes(shell: Shell, plain: Path, dtype: str) -> None:
    report = json.loads(shell("ask", plain, "Hello", "--max-tokens", "2", "--dtype", dtype, "--json").out)
    assert report["dtype"] == {"int8": "w8a16"}.get(dtype, dtype)


# --- the end --------------------------------------------------------------------------------------------------------


def test_a_closed_pipe_ends_quietly(start: Children, endless: Path) -> None:
    process = start("ask", endless, "Hello", "--raw", "--max-tokens", "50000")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


def test_a_pipe_closed_before_a_short_command_prints(start: Children, plain: Path) -> None:
    for command in (
        "list --presets",
        "compare gpt2 llama-7b",
        "inspect-config gpt2",
        "inspect-config gpt2 --json",
        "--help",
    ):
        process = start(*command.split())
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.wait(60) == 141


def test_streams_that_were_never_open(plain: Path) -> None:
    for command in (
        ("list", "--presets"),
        ("compare", "gpt2"),
        ("ask", plain, "Hello", "--max-tokens", "2", "--quiet"),
    ):
        shut = subprocess.run(
            ["sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM, *map(str, command)], stderr=subprocess.PIPE, env=environment()
        )
        assert (shut.returncode, shut.stderr) == (0, b""), command


def test_ctrl_c_ends_quietly(start: Children, endless: Path) -> None:
    process = start("ask", endless, "Hello", "--raw", "--max-tokens", "50000")
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert out.endswith(b"\n")


@pytest.mark.parametrize("seconds", [0.3, 1.4, 3.7])
def test_ctrl_c_while_kernels_are_compiled_ends_quietly_and_soon(
    start: Children, plain: Path, tmp_path: Path, seconds: float
) -> None:
    process = start("ask", plain, "Hello", TINYSERVE_CACHE=str(tmp_path))
    assert process.stderr is not None
    assert b"compiling kernels" in process.stderr.readline()
    sleep(seconds)
    process.send_signal(signal.SIGINT)
    begun = monotonic()
    _, err = process.communicate(timeout=60)
    assert monotonic() - begun < 2
    assert process.returncode == 130
    assert re.fullmatch(rb"(tinyserve: compiled \d+ kernels in \d+ s\n)?", err)


@pytest.mark.parametrize("moment", ["loading", "answering"])
def test_ctrl_c_leaves_no_half_of_an_object(
    shell: Shell, endless: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --json nothing is printed before the end that a test could wait for: the signal comes from within."""
    open_model, stream = loading.open_model, LLM.stream

    def interrupted_open(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return open_model(*arguments, **options)

    def interrupted_stream(*arguments: Any) -> Iterator[Any]:
        for i, chunk in enumerate(stream(*arguments)):
            if i == 3:
                signal.raise_signal(signal.SIGINT)
            yield chunk

    if moment == "loading":
        monkeypatch.setattr(loading, "open_model", interrupted_open)
    else:
        monkeypatch.setattr(LLM, "stream", interrupted_stream)
    result = shell("ask", endless, "Hello", "--raw", "--max-tokens", "50000", "--json")
    assert (result.code, result.out, result.err) == (130, "", "")


def test_ctrl_c_while_the_program_is_imported_ends_quietly(tmp_path: Path) -> None:
    """A module that is imported first presses it; a traceback of imports is what Python would print."""
    (tmp_path / "typer.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([*PROGRAM, "list"], env=environment(PYTHONPATH=path), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_ctrl_c_in_a_terminal_leaves_a_clean_line(endless: Path) -> None:
    with Terminal("ask", endless, "Hello", "--raw", "--max-tokens", "50000", "--verbose") as terminal:
        terminal.wait_for("[--max-tokens]\n")  # the last line before the answer
        terminal.wait_for_more()
        terminal.type("\x03")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.shown
        assert "Error" not in terminal.shown


# --- chat -----------------------------------------------------------------------------------------------------------


def test_chat_remembers_and_forgets(chatty: Path) -> None:
    """Through pipes: answers on stdout, everything else on stderr."""
    llm = LLM(chatty)
    params = SamplingParams(temperature=0, max_tokens=5)
    messages = [{"role": "system", "content": "S"}]
    answers = []
    for text in ("One", "Two"):
        messages.append({"role": "user", "content": text})
        answers.append(llm.chat(messages, params)[0].outputs[0].text)
        messages.append({"role": "assistant", "content": answers[-1]})
    typed = "One\n\nTwo\n/reset\nOne\n/nothing\n/exit\nnever read\n"
    result = run("chat", chatty, "--system", "S", "--max-tokens", "5", stdin=typed)
    assert result.code == 0
    assert result.out == "".join(answer + "\n" for answer in [*answers, answers[0]])
    banner, reset, unknown = result.err.splitlines()
    assert re.fullmatch(rf"{re.escape(str(chatty))}, loaded in \d+\.\d s\. /help .*", banner)
    assert reset == "The conversation is forgotten."
    assert unknown == "There is no /nothing. /help lists what there is."


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_line(shell: Shell, chatty: Path, separator: str) -> None:
    llm, text = LLM(chatty), f"a{separator}b"
    [output] = llm.chat([{"role": "user", "content": text}], SamplingParams(temperature=0, max_tokens=5))
    assert ids(shell, chatty, text, "--max-tokens", "5") == output.outputs[0].token_ids
    assert shell("chat", chatty, "--max-tokens", "5", stdin=f"{text}\n").out == output.outputs[0].text + "\n"


def test_chat_goes_on_when_the_context_is_full(shell: Shell, chatty: Path) -> None:
    result = shell("chat", chatty, "--max-tokens", "5", stdin="x" * 200 + "\nHi\n")
    assert result.code == 0
    assert len(result.out.splitlines()) >= 1
    assert re.search(r"^tinyserve: The prompt has 2\d\d tokens .*: shorten the prompt\.$", result.err, re.MULTILINE)


def test_chat_needs_a_template_and_text(shell: Shell, plain: Path, chatty: Path) -> None:
    result = shell("chat", plain)
    assert result.code == 2
    assert "has no chat template" in result.sentence
    assert f"tinyserve ask {plain}" in result.sentence
    binary = shell("chat", chatty, stdin=b"caf\xe9\n")
    assert binary.code == 2
    assert binary.err.splitlines()[-1] == "tinyserve: Standard input is not UTF-8 text: convert it first."
    for option in (("--max-tokens", "0"), ("--temp", "-1"), ("--dtype", "int9")):
        assert shell("chat", chatty, *option).code == 2


def test_chat_in_a_terminal(endless: Path) -> None:
    """Ctrl-C ends the answer and not the conversation; Ctrl-D ends that."""
    with Terminal("chat", endless, "--max-tokens", "50000", "--verbose") as terminal:
        assert "/help lists the commands" in terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("[--max-tokens]\n")  # the last line before the answer
        terminal.wait_for_more()
        terminal.type("\x03")
        terminal.wait_for("[stopped]")
        terminal.wait_for("> ")
        terminal.type("/nothing\n")
        terminal.wait_for("There is no /nothing")
        terminal.wait_for("> ")
        terminal.type("/reset\n")
        terminal.wait_for("The conversation is forgotten.")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.shown
