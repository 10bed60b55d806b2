"""Text <-> token ids: a checkpoint's own tokenizer, or bytes for random weights; and text as it comes, token by token.

transformers reads the checkpoint's tokenizer files (never running code from the folder); what is ours is the prompt of
exactly n tokens that the measurements need, and the incremental detokeniser.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Protocol

from common.config import ModelConfig
from common.errors import UserError, first_line

PROMPT_TEXT = Path(__file__).parent / "data" / "prompt_text.txt"


class Tokenizer(Protocol):
    """What the scripts need of a tokenizer. Ids are plain ints."""

    eos_token_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Text -> ids, with the beginning-of-text id where the checkpoint puts one."""

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, special tokens left out."""

    def chat(self, text: str) -> list[int]:
        """One user message through the chat template, ready for the answer; without a template the plain text."""

    def prompt_of_length(self, length: int, start: int = 0) -> list[int]:
        """Exactly `length` ids of the text that ships with the lab, from its `start`-th token, repeated as needed."""


class _PromptText:
    """The prompt of exactly n tokens, for both tokenizers."""

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    @cached_property
    def _text_ids(self) -> list[int]:
        return self.encode(PROMPT_TEXT.read_text(encoding="utf-8"))

    def prompt_of_length(self, length: int, start: int = 0) -> list[int]:
        ids = self._text_ids
        return [ids[(start + i) % len(ids)] for i in range(length)]


class PretrainedTokenizer(_PromptText):
    """The tokenizer of a Hugging Face folder."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        from transformers import AutoTokenizer

        try:
            self._hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds here; each means unusable tokenizer files
            remedy = "fetch tokenizer.json anew" if (folder / "tokenizer.json").exists() else "add tokenizer.json"
            raise UserError(f"{folder}: its tokenizer cannot be read ({first_line(error)}); {remedy}") from None
        self.eos_token_ids = config.eos_token_ids
        if len(self._hf) > config.vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has {len(self._hf)} ids, config.json's vocab_size is {config.vocab_size}"
            )

    def encode(self, text: str) -> list[int]:
        return self._hf.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def chat(self, text: str) -> list[int]:
        if self._hf.chat_template is None:
            return self.encode(text)
        messages = [{"role": "user", "content": text}]
        # Rendered to text first: the template writes its own special tokens, so none may be added when encoding.
        rendered = self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._hf.encode(rendered, add_special_tokens=False)


class ByteTokenizer(_PromptText):
    """One id a byte, for random weights: id = byte + 3. Ids outside that range are shown by number, bytes that form no
    character as the replacement character.
    """

    OFFSET = 3

    def __init__(self, config: ModelConfig) -> None:
        if config.vocab_size < 256 + self.OFFSET:
            raise UserError(
                f"config: vocab_size {config.vocab_size} is below the {256 + self.OFFSET} ids that bytes need"
            )
        self.eos_token_ids = config.eos_token_ids

    def encode(self, text: str) -> list[int]:
        return [byte + self.OFFSET for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        data = bytearray()
        for i in ids:
            data += bytes([i - self.OFFSET]) if 0 <= i - self.OFFSET < 256 else f"<{i}>".encode()
        return data.decode(errors="replace")

    def chat(self, text: str) -> list[int]:
        return self.encode(text)


class IncrementalDecoder:
    """Text of a growing list of ids, piece by piece: `push(id)` returns what has become certain.

    A character of several bytes may be spread over several ids; they are held back until it is whole. New ids are
    decoded together with those shown last, since some tokenizers write a word's leading space only after another word.
    """

    MAX_HELD = 3  # a UTF-8 character has at most four bytes: an unfinished one shows as three replacements at most

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Text is decoded from `_context`, where a character begins; `_whole`, later, is the last such place.
        self._context = self._whole = 0
        self._shown = 0  # characters of the text from `_context` that have been returned

    def push(self, token_id: int) -> str:
        """Add one id; returns the new whole characters, often none."""
        self._ids.append(token_id)
        text = self._text(self._context)
        held = min(len(text) - len(text.rstrip("\ufffd")), self.MAX_HELD)  # replacements: perhaps still unfinished
        if held and len(self._ids) - self._whole <= self.MAX_HELD:
            return ""  # tokenizers that fall back to bytes replace what stood before an unfinished character, too
        new = text[self._shown : len(text) - held]
        self._shown += len(new)
        if not held:
            self._context, self._whole = self._whole, len(self._ids)
            self._shown = len(self._text(self._context))
        return new

    def finish(self) -> str:
        """What is held back at the end, with replacement characters for bytes that never became a character."""
        rest = self._text(self._context)[self._shown :]
        self._shown += len(rest)
        return rest

    def _text(self, start: int) -> str:
        return self._tokenizer.decode(self._ids[start:])
