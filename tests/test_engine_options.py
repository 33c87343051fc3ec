"""The table of options: what `LLM` shows and refuses, what `serve` starts with, and what a draft model takes."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tinyserve import LLM
from tinyserve.engine_options import EngineKeywords, EngineOptions
from tinyserve.errors import UserError
from tinyserve.server.options import ServeOptions

OPTIONS = {row.name: row for row in fields(EngineOptions)}


def test_the_signature_of_llm_is_the_table() -> None:
    shown = inspect.signature(LLM).parameters
    assert list(shown)[:1] == ["model"] and {"progress", "reserve"} <= shown.keys()
    for name, row in OPTIONS.items():
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY and shown[name].default == row.default
        assert f"{name}: {row.metadata['help']}" in (LLM.__init__.__doc__ or "")


def test_type_checkers_see_the_table() -> None:
    assert EngineKeywords.__annotations__ == {name: row.type for name, row in OPTIONS.items()}
    assert not EngineKeywords.__required_keys__


def test_a_server_starts_with_the_defaults_of_the_table() -> None:
    import typer

    from tinyserve.cli import app

    command = typer.main.get_command(app).commands["serve"]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    engine, serve = EngineOptions(), ServeOptions(models={})
    same = ("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory", "kv_cache_dtype")
    assert {name: defaults[name] for name in same} == {name: getattr(engine, name) for name in same}
    assert (defaults["load_format"], defaults["threads"]) == (engine.load_format, engine.num_threads)
    assert (defaults["host"], defaults["port"], defaults["max_queue"]) == (serve.host, serve.port, serve.max_queue)
    assert (defaults["max_body"] * 1e6, defaults["drain_timeout"]) == (serve.max_body, serve.drain_timeout)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("max_num_seqs", 0, "max_num_seqs is 0; it must be a whole number of at least 1."),
        ("max_num_seqs", None, "max_num_seqs is None; it must be a whole number of at least 1."),
        ("max_num_seqs", 65537, "max_num_seqs is 65537; it must be at most 65536."),
        ("max_num_batched_tokens", True, "max_num_batched_tokens is True; it must be a whole number of at least 1."),
        ("max_model_len", 1, "max_model_len is 1; it must be a whole number of at least 2."),
        ("kv_cache_memory", 1e9, "kv_cache_memory is 1000000000.0; it must be a whole number of at least 1."),
        ("block_size", 24, "block_size is 24; it must be a multiple of 16."),
        ("num_threads", 0, "num_threads is 0; it must be a whole number of at least 1."),
        ("seed", -1, "seed is -1; it must be a whole number of at least 0."),
        ("enable_prefix_caching", 1, "enable_prefix_caching is 1; it must be True or False."),
        ("load_format", "pickle", "load_format 'pickle' does not exist; there are auto and dummy."),
        ("kv_cache_dtype", "int4", "kv_cache_dtype 'int4' does not exist; there are auto, float32, bfloat16, int8."),
    ],
)
def test_what_is_out_of_range_is_refused(option: str, value: Any, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        EngineOptions(**{option: value})
    assert str(refused.value) == sentence


@pytest.mark.parametrize("option", ["dtype", "speculative_config"])
def test_names_within_are_checked_too(option: str) -> None:
    value: Any = "int5" if option == "dtype" else {"method": "draft_model", "model": "gpt2", "dtype": "int5"}
    with pytest.raises(UserError, match=r"dtype 'int5' is not built; there are float32, .* Did you mean 'int"):
        EngineOptions(**{option: value})


def test_an_option_that_does_not_exist_names_the_nearest(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError) as refused:
        LLM(folder_of("llama"), max_num_sequences=3)
    assert str(refused.value) == (
        "LLM has no option 'max_num_sequences'. Did you mean 'max_num_seqs'? The options are "
        f"{', '.join([*OPTIONS, 'progress', 'reserve'])}."
    )


def test_a_draft_model_takes_its_targets_options(folder_of: Callable[[str], Path]) -> None:
    config = {"method": "draft_model", "model": str(folder_of("llama")), "dtype": "bfloat16"}
    llm = LLM(
        folder_of("llama"), dtype="float32", block_size=32, max_num_batched_tokens=24, max_num_seqs=2,
        num_threads=1, speculative_config=config,
    )  # fmt: skip
    own, draft = llm.engine, llm.engine.scheduler.speculation.proposer.engine  # type: ignore[union-attr, attr-defined]
    for engine in (own, draft):
        scheduler = engine.scheduler
        assert (scheduler.blocks.block_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (32, 2, 24)
        assert engine.runner.num_threads == 1
    assert [engine.runner.cache.dtype for engine in (own, draft)] == ["float32", "bfloat16"]
    llm.close()
