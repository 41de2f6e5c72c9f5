"""Text in and out: ``Tokenizer`` (load, encode, decode), ``Detokenizer`` (streams), chat templates.

Nothing here imports torch or transformers, and jinja2 is imported when a template is rendered.
"""

from skimp.text.detokenize import Detokenizer
from skimp.text.tokenizer import Tokenizer, TokenizerError

__all__ = ["Detokenizer", "Tokenizer", "TokenizerError"]
