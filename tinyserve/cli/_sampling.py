"""How an answer is decoded: by what the command line says, else by what the model's makers say, else greedily.

Knows the names of the flags and who is asked before whom; the values are checked by SamplingParams.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyserve.errors import UserError
from tinyserve.sampling_params import SamplingParams, StructuredOutputs

if TYPE_CHECKING:
    from tinyserve.llm import LLM

DEFAULT = "default"
# Options that are decided in any case, and what they are if nobody does; `decide` knows better of two of them.
_ROWS = [row for row in SamplingParams.rows.values() if row.cli and row.default not in (None, ())]
_DEFAULTS = {row.name: row.default for row in _ROWS}
_FILTERS = [row.name for row in _ROWS if row.stage == "draw" and row.name != "temperature"]


@dataclass(frozen=True)
class Decoding:
    """SamplingParams, and who has decided each of them: a flag, a file, or the default."""

    params: SamplingParams
    origins: Mapping[str, str]
    prompt_tokens: int


def given(**options: Any) -> SamplingParams:
    """Check what the command line says before a model is loaded; what is None is not said. Raises RequestError."""
    return SamplingParams(**{name: value for name, value in options.items() if value is not None})


def structure(json_schema: str | None, regex: str | None) -> StructuredOutputs | None:
    """What the answer must look like; a schema is given as a file's name or as it is. Raises UserError."""
    if json_schema is None and regex is None:
        return None
    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        try:
            json_schema = Path(json_schema).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise UserError(f"--json-schema {json_schema}: this file cannot be read ({error}).") from None
    return StructuredOutputs(json=json_schema, regex=regex)


def decide(llm: "LLM", options: Mapping[str, Any], prompt: str | list[int], max_tokens: int) -> Decoding:
    """Settle every option for a prompt; `max_tokens` is for when nobody says.

    The prompt and the answer together never come to more than the context.
    """
    assert llm.tokenizer is not None  # only synthetic weights have none
    prompt_tokens = len(llm.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt)
    model = llm.generation_config
    fallback = {**_DEFAULTS, "temperature": 1.0 if model.do_sample else 0.0, "max_tokens": max_tokens}
    file = Path(model.source).name
    values, origins = dict(options), {}
    for name, value in fallback.items():
        if options.get(name) is not None:
            origins[name] = f"--{name.replace('_', '-')}"
        elif name in model.sampling():
            values[name], origins[name] = model.sampling()[name], file
        else:
            values[name], origins[name] = value, DEFAULT
    if model.do_sample and origins["temperature"] == DEFAULT:
        origins["temperature"] = f"{file} asks to sample"
    room = llm.max_model_len - prompt_tokens
    if values["max_tokens"] > room:
        origins["max_tokens"] = f"what is left; {values['max_tokens']} by {origins['max_tokens']}"
        values["max_tokens"] = max(1, room)  # without any room the engine refuses the prompt
    return Decoding(given(**values), origins, prompt_tokens)


def explain(llm: "LLM", decoding: Decoding, prompt_is: str) -> str:
    """Lines for --verbose: the prompt, each option and who has decided it, the tokens that end an answer."""
    params, origins, model = decoding.params, decoding.origins, llm.generation_config
    tokens = f"{decoding.prompt_tokens} token{'s' * (decoding.prompt_tokens != 1)}"
    lines = [
        ("prompt", f"{tokens} of a context of {llm.max_model_len}, {prompt_is}"),
        ("weights", llm.model.kept),
        ("cache", str(llm.cache_plan)),
        ("temperature", f"{params.temperature:g}{' (greedy)' * (not params.temperature)}"),
    ]
    if params.temperature:
        lines += [(name, f"{getattr(params, name):g}") for name in _FILTERS]
    if params.has_penalties:
        lines.append(("repetition_penalty", f"{params.repetition_penalty:g}"))
    lines.append(("max_tokens", str(params.max_tokens)))
    lines = [(name, f"{words}  [{origins[name]}]" if name in origins else words) for name, words in lines]
    assert llm.tokenizer is not None
    for token, said in sorted(llm.end_tokens.items()):
        spelled = llm.tokenizer.token_bytes(token, skip_special_tokens=False).decode(errors="replace")
        lines.append(("ends at", f"{token} {spelled}  [{', '.join(said)}]"))
    if model.recommended is not None:
        words = ", ".join(f"{name} {value:g}" for name, value in model.recommended.sampling().items())
        lines.append(("recommended", f"{words}, by the server and in Python  [{Path(model.decided_by).name}]"))
    lines += [("not obeyed", f"{words}  [{Path(model.source).name}]") for words in model.not_obeyed]
    return "\n".join(f"{name:<12} {words}" for name, words in lines)
