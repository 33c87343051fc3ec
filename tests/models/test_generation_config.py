"""generation_config.json: read as transformers writes it, obeyed by `generate` and `ask`, and shown with --verbose."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from command_line import Shell
from oracles import Oracle

from tinyserve import LLM, SamplingParams, quantize
from tinyserve.checkpoints import presets
from tinyserve.cli._sampling import decide
from tinyserve.errors import ConfigError
from tinyserve.models.config import GenerationConfig
from tinyserve.sampling_params import DEFAULT_MAX_TOKENS

TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
SAMPLES = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.05}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def model(folder_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A tiny Llama of 128 positions with a generation_config.json of these keys."""

    def write(**keys: Any) -> Path:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folder_of("llama"), folder)
        (folder / "generation_config.json").write_text(json.dumps(keys))
        return folder

    return write


def test_it_is_read_as_transformers_writes_it(tmp_path: Path, oracle: Oracle) -> None:
    transformers = oracle("transformers")
    ours = SAMPLES | {"typical_p": 0.95, "repetition_penalty": 1.1}
    written = transformers.GenerationConfig(**ours, max_new_tokens=99, eos_token_id=[5, 6], no_repeat_ngram_size=3)
    written.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "generation_config.json").read_text())
    params = {name: value for name, value in ours.items() if name != "do_sample"} | {"max_tokens": 99}
    assert GenerationConfig.parse(raw, "x") == GenerationConfig(
        source="x", do_sample=True, params=params, eos_token_ids=(5, 6), not_obeyed=("no_repeat_ngram_size 3",)
    )
    transformers.GenerationConfig().save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "generation_config.json").read_text())
    assert GenerationConfig.parse(plain, "x") == GenerationConfig(source="x")


def test_nothing_is_drawn_unless_the_file_asks_to_sample() -> None:
    """A repetition penalty is for greedy answers too."""
    numbers = {"temperature": 0.6, "typical_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 7}
    assert GenerationConfig.parse(numbers, "x").sampling() == {"repetition_penalty": 1.1, "max_tokens": 7}
    assert GenerationConfig.parse(numbers | {"do_sample": True}, "x").sampling() == {
        "temperature": 0.6, "typical_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 7,
    }  # fmt: skip


def test_only_what_would_change_an_answer_is_said_to_be_left_out() -> None:
    neutral = {
        "encoder_repetition_penalty": 1.0,
        "num_beams": 1,
        "suppress_tokens": [],
        "typical_p": None,
        "top_h": None,
    }
    assert GenerationConfig.parse(neutral, "x").not_obeyed == ()
    loud = {"num_beams": 4, "suppress_tokens": [1], "epsilon_cutoff": 0.5, "no_repeat_ngram_size": 3}
    assert set(GenerationConfig.parse(loud, "x").not_obeyed) == {
        "num_beams 4", "suppress_tokens [1]", "epsilon_cutoff 0.5", "no_repeat_ngram_size 3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "params"),
    [
        ({"top_k": -1}, {}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"max_new_tokens": -1}, {}),
        ({"typical_p": 1, "top_p": 1, "repetition_penalty": 1}, {"typical_p": 1, "top_p": 1, "repetition_penalty": 1}),
        ({"min_p": 0, "top_p": None, "temperature": None}, {"min_p": 0}),
        ({"num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0, "min_length": -1, "top_h": None}, {}),
        ({"no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": [], "suppress_tokens": [-1]}, {}),
        ({"encoder_repetition_penalty": 1, "forced_eos_token_id": -1, "eos_token_id": [-1, None]}, {}),
    ],
)
def test_what_says_off_is_off(keys: dict[str, Any], params: dict[str, Any]) -> None:
    """In any of the ways in which files for other engines say it."""
    expected = GenerationConfig(source="x", do_sample=True, params=params)
    assert GenerationConfig.parse({"do_sample": True, **keys}, "x") == expected


def test_a_model_whose_file_switches_top_k_off_loads(model: Callable[..., Path]) -> None:
    llm = LLM(model(do_sample=True, temperature=0.7, top_k=-1, eos_token_id=-1))
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.7, max_tokens=DEFAULT_MAX_TOKENS)
    assert llm.end_tokens == {checkpoints.EOS: ["config.json"]}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"do_sample": "yes"}, "'do_sample' must be true or false, but it is 'yes'"),
        ({"temperature": "hot"}, "'temperature' must be a finite number, but it is 'hot'"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1.0; it must be"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5; it must be"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0; it must be"),
        ({"top_k": 2.5}, "'top_k' must be an integer, but it is 2.5"),
        ({"max_new_tokens": 0}, "'max_new_tokens' must be at least 1, but it is 0"),
        ({"do_sample": True, "temperature": 10**400}, "'temperature' must be a finite number, but it is 1000"),
        ({"top_k": 2**40}, "'top_k' must be at most 2147483647, but it is 1099511627776"),
        ({"eos_token_id": 2**70}, "'eos_token_id' must be a token id or a list of them, but it is 1180"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' must be a token id or a list of them, but it is '</s>'"),
    ],
)
def test_what_is_wrong_in_it_is_said_with_its_name(model: Callable[..., Path], keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        LLM(model(**keys))
    assert "generation_config.json: " in str(error.value)


def test_generate_without_params_draws_as_the_model_asks(model: Callable[..., Path]) -> None:
    llm = LLM(model(**SAMPLES, max_new_tokens=12), seed=3)
    params = SamplingParams(temperature=0.6, top_p=0.9, top_k=40, min_p=0.05, max_tokens=12)
    assert llm.get_default_sampling_params() == params
    (own,) = llm.generate("Hello")
    (same,) = LLM(llm.path, seed=3).generate("Hello", params)
    assert own.outputs[0].token_ids == same.outputs[0].token_ids
    assert [chunk.token_ids for chunk in LLM(llm.path, seed=3).stream("Hello")] == [
        chunk.token_ids for chunk in LLM(llm.path, seed=3).stream("Hello", params)
    ]
    assert LLM(model(temperature=0.6)).get_default_sampling_params() == SamplingParams(max_tokens=DEFAULT_MAX_TOKENS)


def test_each_end_token_knows_who_says_so(model: Callable[..., Path]) -> None:
    folder = model(eos_token_id=[7, checkpoints.EOS])
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|user|>"}')
    assert LLM(folder).end_tokens == {
        checkpoints.EOS: ["config.json", "generation_config.json"],
        7: ["generation_config.json"],
        checkpoints.USER: ["tokenizer"],
    }


def test_a_gguf_file_says_it_in_its_metadata(tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"]
    sampling = {"temp": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "penalty_repeat": 1.1}
    metadata = checkpoints.gguf_metadata(raw) | {f"general.sampling.{name}": n for name, n in sampling.items()}
    file = checkpoints.write_gguf(tmp_path / "m.gguf", "llama", metadata, checkpoints.gguf_tensors(raw))
    llm = LLM(file)
    params = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}
    expected = SamplingParams(**params, max_tokens=DEFAULT_MAX_TOKENS)
    assert llm.get_default_sampling_params() == expected
    assert llm.end_tokens == {checkpoints.EOS: ["metadata"]}
    quantize.write(str(file), tmp_path / "packed", "int8")
    packed = LLM(tmp_path / "packed")
    assert packed.get_default_sampling_params() == expected
    assert packed.end_tokens.keys() == llm.end_tokens.keys()
    greedy = checkpoints.write_model_gguf(tmp_path / "greedy.gguf", raw)
    assert LLM(greedy).get_default_sampling_params() == SamplingParams(max_tokens=DEFAULT_MAX_TOKENS)


# --- ask ------------------------------------------------------------------------------------------------------------


def ids(shell: Shell, *arguments: str | Path) -> list[int]:
    result = shell("ask", *arguments, "--json")
    assert result.code == 0, result.err
    found: list[int] = json.loads(result.out)["token_ids"]
    return found


def test_ask_obeys_the_file_and_a_flag_comes_first(shell: Shell, model: Callable[..., Path]) -> None:
    folder = model(**SAMPLES | {"temperature": 2.0, "top_k": 200, "top_p": 1.0, "min_p": 0.0}, max_new_tokens=12)
    llm = LLM(folder)
    params = {"temperature": 2.0, "top_k": 200, "max_tokens": 12, "seed": 5}
    (own,) = llm.generate("Hello", SamplingParams(**params))
    (greedy,) = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=12))
    assert own.outputs[0].token_ids != greedy.outputs[0].token_ids
    assert ids(shell, folder, "Hello", "--raw", "--seed", "5") == own.outputs[0].token_ids
    assert ids(shell, folder, "Hello", "--raw", "--temp", "0") == greedy.outputs[0].token_ids
    assert ids(shell, folder, "Hello", "--raw", "--seed", "5", "--top-k", "1") == greedy.outputs[0].token_ids
    (other,) = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=12, repetition_penalty=0.1))
    assert other.outputs[0].token_ids != greedy.outputs[0].token_ids
    flags = "--raw", "--temp", "0", "--repetition-penalty", "0.1"
    assert ids(shell, folder, "Hello", *flags) == other.outputs[0].token_ids
    (typical,) = llm.generate("Hello", SamplingParams(**params, typical_p=0.2))
    assert typical.outputs[0].token_ids != own.outputs[0].token_ids
    flags = "--raw", "--seed", "5", "--typical-p", "0.2"
    assert ids(shell, folder, "Hello", *flags) == typical.outputs[0].token_ids
    (near,) = llm.generate("Hello", SamplingParams(**params, top_n_sigma=1.0))
    assert near.outputs[0].token_ids != own.outputs[0].token_ids
    flags = "--raw", "--seed", "5", "--top-n-sigma", "1"
    assert ids(shell, folder, "Hello", *flags) == near.outputs[0].token_ids
    assert ids(shell, folder, "Hello", "--raw", "--temp", "0", "--max-tokens", "3") == greedy.outputs[0].token_ids[:3]
    quiet = model(temperature=2.0)  # and does not ask to sample
    assert ids(shell, quiet, "Hello", "--raw", "--max-tokens", "12") == greedy.outputs[0].token_ids


def test_verbose_shows_what_applies_and_from_where(shell: Shell, model: Callable[..., Path]) -> None:
    folder = model(**SAMPLES, eos_token_id=7, repetition_penalty=1.1, num_beams=4)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    said = shell("ask", folder, "Hello", "--top-k", "3", "--seed", "1", "--verbose", "--quiet")
    assert said.code == 0
    assert said.err.splitlines() == [
        "prompt       6 tokens of a context of 128, by the model's chat template",
        f"weights      {LLM(folder).model.kept}",
        "cache        8 blocks of 16 tokens, 215.0 kB (room that is taken only as it is used)",
        "temperature  0.6  [generation_config.json]",
        "top_k        3  [--top-k]",
        "top_p        0.9  [generation_config.json]",
        "min_p        0.05  [generation_config.json]",
        "typical_p    1  [default]",
        "top_n_sigma  0  [default]",
        "repetition_penalty 1.1  [generation_config.json]",
        "max_tokens   122  [what is left; 256 by default]",
        f"ends at      7 {LLM(folder).tokenizer.token_bytes(7).decode(errors='replace')}  [generation_config.json]",
        "ends at      259 <|eos|>  [config.json]",
        "not obeyed   num_beams 4  [generation_config.json]",
    ]
    plain = shell("ask", model(do_sample=True), "H", "--raw", "--max-tokens", "200", "--verbose", "--quiet")
    prompt, weights, cache, temperature = plain.err.splitlines()[:4]
    assert weights.startswith("weights ") and cache.startswith("cache ")
    assert [prompt, temperature] == [
        "prompt       1 token of a context of 128, continued as it is (--raw)",
        "temperature  1  [generation_config.json asks to sample]",
    ]
    assert "max_tokens   127  [what is left; 200 by --max-tokens]" in plain.err
    folder = model()
    (folder / "tokenizer_config.json").write_text("{}")
    greedy = shell("ask", folder, "H", "--max-tokens", "2", "--verbose", "--quiet").err.splitlines()
    assert [greedy[0], *greedy[3:5]] == [
        "prompt       1 token of a context of 128, continued as it is: the model has no chat template",
        "temperature  0 (greedy)  [default]",
        "max_tokens   2  [--max-tokens]",
    ]


def test_chat_obeys_the_file_too(shell: Shell, model: Callable[..., Path]) -> None:
    folder = model(**SAMPLES, max_new_tokens=5)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (expected,) = LLM(folder).chat(
        [{"role": "user", "content": "Hi"}],
        SamplingParams(temperature=0.6, top_p=0.9, top_k=40, min_p=0.05, max_tokens=5, seed=2),
    )
    said = shell("chat", folder, "--seed", "2", "--verbose", stdin="Hi\n")
    assert said.out == expected.outputs[0].text + "\n"
    assert "max_tokens   5  [generation_config.json]" in said.err


def test_prompt_and_answer_never_come_to_more_than_the_context(llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("llama")
    assert llm.max_model_len == 128
    for prompt in range(1, 128):
        for asked in ({}, {"max_tokens": 1}, {"max_tokens": 60}, {"max_tokens": 100_000}):
            params = decide(llm, asked, [1] * prompt, 50).params
            assert params.max_tokens == min(asked.get("max_tokens", 50), 128 - prompt)


# --- what the families do -------------------------------------------------------------------------------------------


def install(root: Path, name: str, template: str | None) -> Path:
    """Put a tiny checkpoint where a preset's download would be."""
    preset = presets.get(name)
    commit = preset.revision if len(preset.revision) == 40 else "0" * 40
    folder = root / f"models--{preset.repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    kind = {"smollm2": "llama", "granite": "granite-hybrid", "falcon": "falcon-7b", "qwen": "qwen3"}.get(
        preset.family, preset.family
    )
    snapshot = checkpoints.write_folder(folder / "snapshots" / commit, checkpoints.CONFIGS[kind])
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return snapshot


@pytest.mark.parametrize(
    ("words", "name", "template"),
    [
        (("gpt2",), "gpt2", None),
        (("falcon",), "falcon-7b", None),
        (("falcon", "--model", "7b-instruct"), "falcon-7b-instruct", TEMPLATE),
        (("llama",), "llama-3.2-1b", TEMPLATE),
        (("mistral",), "mistral-7b", TEMPLATE),
        (("smollm2",), "smollm2-135m", TEMPLATE),
        (("granite",), "granite-350m", TEMPLATE),
    ],
    ids=lambda value: value if isinstance(value, str) and "{" not in value else "",
)
def test_base_models_complete_and_instruct_models_answer(
    shell: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    name: str,
    template: str | None,
) -> None:
    """The default of every family, and of Falcon both."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = install(tmp_path, name, template)
    assert (template is not None) is presets.get(name).chat
    llm, params = LLM(snapshot), SamplingParams(temperature=0, max_tokens=6)
    (completed,) = llm.generate("Hi", params)
    wanted = completed if template is None else llm.chat([{"role": "user", "content": "Hi"}], params)[0]
    assert (len(wanted.prompt_token_ids) > len(completed.prompt_token_ids)) is (template is not None)
    for flags, expected in (((), wanted), (("--raw",), completed)):
        report = json.loads(shell("ask", *words, "Hi", "--max-tokens", "6", "--json", *flags).out)
        assert report["prompt_tokens"] == len(expected.prompt_token_ids)
        assert report["token_ids"] == expected.outputs[0].token_ids
    said = shell("ask", *words, "Hi", "--max-tokens", "1", "--verbose").err
    assert ("by the model's chat template" if template else "the model has no chat template") in said


# --- what makers recommend elsewhere ----------------------------------------------------------------------------------


def test_recommended_sampling_is_for_files_that_say_nothing() -> None:
    raw = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
    silent = GenerationConfig.parse({"eos_token_id": 3, "max_new_tokens": 9}, "generation_config.json")
    recommended = silent.with_recommended(raw, "presets/x.json")
    assert recommended.sampling() == silent.sampling() == {"max_tokens": 9}  # `ask` stays greedy
    assert recommended.defaults() == {"temperature": 0.2, "top_p": 0.9, "max_tokens": 9}
    assert (recommended.decided_by, recommended.eos_token_ids) == ("presets/x.json", (3,))
    for keys in ({"do_sample": True}, {"temperature": 0.6}, {"do_sample": True, "top_k": 5}):
        file = GenerationConfig.parse(keys, "generation_config.json")
        assert file.with_recommended(raw, "presets/x.json") == file
    assert silent.with_recommended({}, "presets/x.json") == silent


@pytest.mark.parametrize("name", presets.names())
def test_what_presets_recommend_can_be_obeyed(name: str) -> None:
    preset = presets.get(name)
    parsed = GenerationConfig.parse(preset.generation_config, preset.source)
    assert parsed.as_json().items() >= dict(preset.generation_config).items() and not parsed.not_obeyed
    if preset.generation_config:
        assert preset.chat and SamplingParams(**parsed.sampling()).temperature < 1


@pytest.mark.real_model
def test_the_real_model_is_sampled_as_its_makers_say(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyserve.loading.hub.resolve", lambda *_, **__: smollm2)
    llm = LLM("smollm2-135m", max_model_len=256, max_num_seqs=2)
    expected = SamplingParams(temperature=0.2, top_p=0.9, max_tokens=DEFAULT_MAX_TOKENS)
    assert llm.get_default_sampling_params() == expected
