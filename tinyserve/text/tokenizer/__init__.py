"""Text to token ids and back, from a checkpoint's own files.

Knows nothing about models, requests or conversations: a chat is rendered to text elsewhere.
"""

from tinyserve.text.tokenizer.detokenizer import Detokenizer
from tinyserve.text.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
