"""generation_config.json: how a model's makers want it decoded, and where it ends.

Knows keys and values; what a user says instead, and what nobody says, is decided above.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from tinyserve.checkpoints.fields import NO_TOKEN, Fields, shown
from tinyserve.errors import RequestError
from tinyserve.sampling_params import Param, SamplingParams

_ROWS = {row.file: row for row in SamplingParams.rows.values() if row.file is not None}
# What else changes an answer in transformers, and the values that leave it as it is. Below zero is off for all of them.
_NOT_BUILT: Mapping[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1, 0),
    "no_repeat_ngram_size": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (1, 0),
    "num_beams": (1, 0),
    "num_beam_groups": (1, 0),
    "penalty_alpha": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([], [[]]),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([], [-1]),
    "begin_suppress_tokens": ([], [-1]),
    "forced_bos_token_id": NO_TOKEN,
    "forced_eos_token_id": NO_TOKEN,
    "forced_decoder_ids": ([],),
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What the file says."""

    source: str
    do_sample: bool = False  # false is greedy, whatever the numbers below are
    params: Mapping[str, Any] = field(default_factory=dict)  # those of SamplingParams, under its names
    eos_token_ids: tuple[int, ...] = ()
    not_obeyed: tuple[str, ...] = ()  # "num_beams 4": what would change answers and is not built
    recommended: "GenerationConfig | None" = None  # what the makers say elsewhere, for where the file says nothing

    @classmethod
    def parse(cls, raw: Mapping[str, Any], source: str) -> Self:
        """Read the keys; raises ConfigError naming `source`, key and value."""
        fields = Fields(raw, source)
        config = cls(
            source=source,
            do_sample=fields.boolean("do_sample", default=False),
            params={
                row.name: _read(fields, key, row)
                for key, row in _ROWS.items()
                if fields.has(key) and not (row.kind is int and _is_negative(raw[key]))
            },
            eos_token_ids=fields.token_ids("eos_token_id", default=None),
            not_obeyed=tuple(
                f"{key} {shown(raw[key])}"
                for key, neutral in _NOT_BUILT.items()
                if fields.has(key) and raw[key] not in neutral and not _is_negative(raw[key])
            ),
        )
        try:
            SamplingParams(**config.sampling())
        except RequestError as error:
            fields.refuse(str(error))
        return config

    def sampling(self) -> dict[str, Any]:
        """What of SamplingParams the file decides: nothing of the drawing unless it asks to sample."""
        drawn = {row.name for row in _ROWS.values() if row.stage == "draw"}
        return {name: value for name, value in self.params.items() if self.do_sample or name not in drawn}

    def defaults(self) -> dict[str, Any]:
        """What of SamplingParams holds for a request that says nothing: the file's, else what is recommended."""
        return (self if self.recommended is None else self.recommended).sampling() | self.sampling()

    @property
    def decided_by(self) -> str:
        """The file that `defaults` are from."""
        return self.source if self.recommended is None else self.recommended.source

    def with_recommended(self, raw: Mapping[str, Any], source: str) -> Self:
        """The same, with keys of such a file that somebody else wrote, unless this one says itself how to draw."""
        drawn = [row.name for row in _ROWS.values() if row.stage == "draw"]
        if not raw or self.do_sample or any(name in self.params for name in drawn):
            return self
        return replace(self, recommended=type(self).parse(raw, source))

    def as_json(self) -> dict[str, Any]:
        """The file again, as far as it is read here."""
        values = {key: self.params[row.name] for key, row in _ROWS.items() if row.name in self.params}
        return {"do_sample": self.do_sample, **values, "eos_token_id": list(self.eos_token_ids)}


def _is_negative(value: Any) -> bool:
    """Whether a value is below zero, which is how files for other engines say that a limit is off."""
    return type(value) in (int, float) and value < 0


def _read(fields: Fields, key: str, row: Param) -> Any:
    if row.kind is int:
        return fields.integer(key, minimum=0 if row.default == 0 else 1)  # 0 is off, or nothing
    return fields.number(key, positive=False)
