"""generation_config.json: how a model's makers want it decoded, and where it ends.

Knows keys and values; what a user says instead, and what nobody says, is decided above.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from tinyserve.errors import RequestError
from tinyserve.models.config.base import Fields
from tinyserve.sampling_params import SamplingParams

_NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty")
# What else changes an answer in transformers, and the values that leave it as it is.
_NOT_BUILT: Mapping[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "num_beams": (1,),
    "penalty_alpha": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What the file says, under transformers' names; None where it says nothing."""

    source: str
    do_sample: bool = False  # false is greedy, whatever the numbers below are
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    not_obeyed: tuple[str, ...] = ()  # "num_beams 4": what would change answers and is not built

    @classmethod
    def parse(cls, raw: Mapping[str, Any], source: str) -> Self:
        """Read the keys; raises ConfigError naming `source`, key and value."""
        fields = Fields(raw, source)
        config = cls(
            source=source,
            do_sample=fields.boolean("do_sample", default=False),
            top_k=fields.integer("top_k", default=None, minimum=0),
            max_new_tokens=fields.integer("max_new_tokens", default=None),
            eos_token_ids=fields.token_ids("eos_token_id", default=None),
            not_obeyed=tuple(
                f"{key} {raw[key]}"
                for key, neutral in _NOT_BUILT.items()
                if fields.has(key) and raw[key] not in neutral
            ),
            **{key: fields.number(key, positive=False) for key in _NUMBERS if fields.has(key)},
        )
        try:
            SamplingParams(**config.sampling())
        except RequestError as error:
            fields.refuse(str(error))
        return config

    def sampling(self) -> dict[str, Any]:
        """What of SamplingParams the file decides: nothing of the drawing unless it asks to sample."""
        drawn = ("temperature", "top_p", "top_k", "min_p", "typical_p") if self.do_sample else ()
        values = {name: getattr(self, name) for name in (*drawn, "repetition_penalty")}
        values["max_tokens"] = self.max_new_tokens
        return {name: value for name, value in values.items() if value is not None}

    def as_json(self) -> dict[str, Any]:
        """The file again, as far as it is read here."""
        keys = (*_NUMBERS, "top_k", "max_new_tokens")
        values = {key: value for key in keys if (value := getattr(self, key)) is not None}
        return {"do_sample": self.do_sample, **values, "eos_token_id": list(self.eos_token_ids)}
