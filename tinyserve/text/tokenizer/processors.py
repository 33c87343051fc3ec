"""What a tokenizer puts around a text.

Knows the tokens it is given, and not who asked for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers


def add_bos_and_eos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `encode` begin with `bos` and end with `eos`, where they are not None."""
    from tokenizers import processors

    around = [(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None]
    if around:
        single = [token for token in (bos, "$A", eos) if token is not None]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
