"""Which field of a request's body a parameter comes from, where the two have different names.

Errors of lower layers name parameters as the Python API does; clients know the names they sent.
"""

from collections.abc import Mapping

from tinyserve.server.protocol import Body, ChatBody, Decoding, EmbeddingBody, TemplateBody, TokenizeBody
from tinyserve.server.sampling import structure_field


def aliases_of(body: Body) -> Mapping[str, str]:
    """Parameter -> field of this body; whatever is not among them has the same name in both."""
    aliases: dict[str, str] = {}
    if isinstance(body, EmbeddingBody):
        aliases["prompt"] = "input"
    elif isinstance(body, ChatBody | TemplateBody) or (isinstance(body, TokenizeBody) and body.messages is not None):
        aliases["prompt"] = "messages"
    if isinstance(body, Decoding):
        aliases["structured_outputs"] = structure_field(body)
    if isinstance(body, ChatBody):
        if body.max_completion_tokens is not None:
            aliases["max_tokens"] = "max_completion_tokens"
        if body.tools and getattr(body, aliases["structured_outputs"]) is None:
            aliases["structured_outputs"] = "tool_choice"  # its grammar is the only one
    return aliases
