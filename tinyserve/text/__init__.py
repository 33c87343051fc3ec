"""All that knows text: tokenizers, chat templates, tools, grammars, and requests in and out of the engine."""
