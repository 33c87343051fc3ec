"""From a name to an answer as processes of their own: a Hub on loopback, the real client, real files, no internet."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from command_line import Result, run
from fake_hub import FakeHub

from tinyserve import LLM, SamplingParams
from tinyserve.checkpoints import presets

PROMPT = "The capital of France is"
# A system message is read as such, so that its effect shows.
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|eos|>{% endfor %}<|user|>"


def ask(hub: FakeHub, home: Path, *arguments: str, **variables: str) -> Result:
    return run("ask", *arguments, HF_ENDPOINT=hub.url, HF_HOME=str(home), **variables)


def answer(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 1
    parsed: dict[str, Any] = json.loads(result.out)
    return parsed


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def gpt2(hub: FakeHub) -> Path:
    """openai-community/gpt2 in miniature: unlike what the preset says, and without a chat template, as the real one."""
    folder = checkpoints.write_folder(hub.root / presets.get("gpt2").repo, checkpoints.CONFIGS["gpt2"])
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|eos|>"}')
    return folder


@pytest.fixture
def chat_model(hub: FakeHub) -> Path:
    """The repository of smollm2-360m, in two shards, with a chat template in a file of its own."""
    from safetensors.numpy import save_file

    raw = checkpoints.CONFIGS["llama-grouped"]
    folder = checkpoints.write_folder(hub.root / presets.get("smollm2-360m").repo, raw)
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|bos|>", "eos_token": "<|eos|>"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tensors = checkpoints.tensors_of(raw)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_ask_gpt2_is_cut_off_then_resumes_then_answers_offline(hub: FakeHub, gpt2: Path, tmp_path: Path) -> None:
    home, options = tmp_path / "hf", ("--max-tokens", "12", "--json")
    hub.dies_after = 500_000
    cut = ask(hub, home, "gpt2", PROMPT, *options)
    assert cut.code == 1
    assert cut.out == ""
    assert "Traceback" not in cut.err
    last = cut.err.splitlines()[-1]
    assert last.startswith("tinyserve: ") and last.endswith("."), cut.err

    hub.dies_after = None
    hub.requests.clear()
    resumed = answer(ask(hub, home, "gpt2", PROMPT, *options))
    (get,) = hub.served("model.safetensors")
    start = int(get.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 500_000
    assert presets.get("gpt2").revision in get.path
    # The checkpoint's own config was used: the preset's has other sizes and could not have read these weights.
    assert resumed["prompt_tokens"] == len(PROMPT)
    assert len(resumed["token_ids"]) == 12

    hub.__exit__()
    offline = answer(run("ask", "gpt2", PROMPT, *options, HF_HUB_OFFLINE="1", HF_ENDPOINT=hub.url, HF_HOME=str(home)))
    assert (offline["text"], offline["token_ids"]) == (resumed["text"], resumed["token_ids"])
    (expected,) = LLM(gpt2).generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))
    assert offline["token_ids"] == expected.outputs[0].token_ids
    # Without the offline flag and with nobody listening, what is complete needs no network either.
    plain = run("ask", "gpt2", PROMPT, "--max-tokens", "12", HF_ENDPOINT=hub.url, HF_HOME=str(home))
    assert plain.out == resumed["text"] + "\n"
    assert plain.err.startswith("[gpt2 · load ")


def test_a_sharded_model_that_chats(hub: FakeHub, chat_model: Path, tmp_path: Path) -> None:
    home, options = tmp_path / "hf", ("--model", "360m", "--max-tokens", "8", "--json")
    with_system = answer(ask(hub, home, "smollm2", "Who?", "--system", "Be brief.", *options))
    without = answer(ask(hub, home, "smollm2", "Who?", *options, HF_HUB_OFFLINE="1"))
    raw = answer(ask(hub, home, "smollm2-360m", "Who?", "--raw", "--max-tokens", "8", "--json", HF_HUB_OFFLINE="1"))
    conversation = "<|bos|>system: Be brief.<|eos|>user: Who?<|eos|><|user|>"
    special = sum(conversation.count(token) for token in checkpoints.SPECIAL)
    text = len(conversation) - sum(len(token) * conversation.count(token) for token in checkpoints.SPECIAL)
    assert with_system["prompt_tokens"] == text + special
    assert with_system["prompt_tokens"] - without["prompt_tokens"] == len("system: Be brief.") + 1
    assert raw["prompt_tokens"] in (len("Who?"), len("Who?") + 1)
    assert len({tuple(found["token_ids"]) for found in (with_system, without, raw)}) > 1

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    (expected,) = LLM(chat_model).chat(messages, SamplingParams(temperature=0, max_tokens=8))
    assert with_system["token_ids"] == expected.outputs[0].token_ids
    assert with_system["text"] == expected.outputs[0].text


def test_a_shard_that_is_missing_is_a_sentence(hub: FakeHub, chat_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(chat_model, folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    sentence = run("ask", folder, "Who?").sentence
    assert "model-00002-of-00002.safetensors is missing" in sentence


def test_a_gguf_file_and_its_folder_of_safetensors_agree(tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"]
    folder = checkpoints.write_folder(tmp_path / "folder", raw)
    file = checkpoints.write_model_gguf(tmp_path / "model.gguf", raw)
    options = ("Hello there", "--raw", "--max-tokens", "10", "--dtype", "float32", "--json")
    first, second = answer(run("ask", folder, *options)), answer(run("ask", file, *options))
    assert first["dtype"] == "float32"
    assert first["token_ids"] == second["token_ids"]
    logits = [LLM(model, dtype="float32").logits("Hello there") for model in (folder, file)]
    np.testing.assert_array_equal(*logits)


def test_the_default_model_knows_paris(smollm2: Path) -> None:
    model = os.environ.get("TINYSERVE_TEST_GGUF") or "smollm2-135m"
    result = run("ask", model, "What is the capital of France?", "--max-tokens", "24")
    assert result.code == 0, result.err
    assert "Paris" in result.out
    assert "Paris" not in result.err
    assert "tokens at" in result.err.splitlines()[-1]
