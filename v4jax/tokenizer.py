"""`tokenizer.json`, the end tokens of a model directory, and its chat encoding, behind one object."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from v4jax.chat import BOS, EOS, FixedStrings, encode_messages
from v4jax.errors import UserError


class TokenizerError(UserError):
    """A tokenizer that is missing or cannot be read."""


class Tokenizer:
    """Text to token ids and back. Nothing is added to the text: the chat encoding writes its own special tokens."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        strings: FixedStrings | None = None,
    ) -> None:
        """Wraps a tokenizer of the `tokenizers` package.

        Args:
          backend: the tokenizer.
          bos_token_id: the id of the start token; None looks the released models' token up.
          eos_token_ids: ids that end a completion; none looks the released models' token up.
          strings: the fixed strings of the chat encoding.
        """
        self.backend = backend
        self.bos_token_id = backend.token_to_id(BOS) if bos_token_id is None else bos_token_id
        ends = list(eos_token_ids) or [backend.token_to_id(EOS)]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(end for end in ends if end is not None))
        self.strings = strings

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json`, the token ids of the config files and the encoding file of a model directory.

        Raises:
          TokenizerError: if `tokenizer.json` is missing or broken, or the token ids of a config file are no ids.
        """
        directory = Path(directory)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(f"no tokenizer.json in {directory}; copy it there from the original checkpoint")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exceptions
            raise TokenizerError(f"{file} cannot be read ({error}); copy it from the checkpoint again") from None
        files = [directory / name for name in ("generation_config.json", "config.json")]
        configs = {file: _read_json(file) for file in files}
        ends = [end for file, config in configs.items() for end in _token_ids(file, config, "eos_token_id")]
        starts = [start for file, config in configs.items() for start in _token_ids(file, config, "bos_token_id")]
        return cls(
            backend,
            bos_token_id=starts[0] if starts else None,
            eos_token_ids=ends,
            strings=FixedStrings.from_directory(directory),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included. A model's table may be larger."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Token ids of a text; special tokens written in it become their ids.

        Raises:
          TokenizerError: the text is no Unicode, as when a command line's bytes were not UTF-8.
        """
        if (lone := find_lone_surrogate(text)) is not None:
            raise TokenizerError(f"the text has {text[lone]!r} at character {lone}, need Unicode; write it as UTF-8")
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_token_id, *ids] if add_bos and self.bos_token_id is not None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, in parallel."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation; the options are those of `v4jax.chat.encode_messages`."""
        return self.encode(encode_messages(messages, strings=self.strings, **options))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = False) -> "TextStream":
        """A decoder that is fed token by token."""
        return TextStream(self, skip_special_tokens=skip_special_tokens)


class TextStream:
    """Turns tokens into text as they come. A character whose bytes are spread over tokens comes out once, whole.

    The pieces of `push`, then of `finish`, add up to `Tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False) -> None:
        """Starts an empty stream."""
        self._tokenizer = tokenizer
        self._is_skipping = skip_special_tokens
        self._context: list[int] = []  # written in full, and decoded again so that a piece's leading space is kept
        self._pending: list[int] = []
        self._written = 0  # characters of the pending tokens' text that are out already

    def push(self, token: int) -> str:
        """The text that is certain now: an open character, shown by a last U+FFFD, waits for its other bytes."""
        self._pending.append(int(token))
        text = self._pending_text()
        is_open = text.endswith("\N{REPLACEMENT CHARACTER}")
        piece = text[self._written : len(text) - is_open]
        if is_open:
            self._written += len(piece)
        else:
            self._context, self._pending, self._written = self._pending, [], 0
        return piece

    def finish(self) -> str:
        """What is left at the end: bytes that never became a character come out as U+FFFD."""
        piece = self._pending_text()[self._written :]
        self._context, self._pending, self._written = [], [], 0
        return piece

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=self._is_skipping)
        both = self._tokenizer.decode(self._context + self._pending, skip_special_tokens=self._is_skipping)
        return both[len(before) :]


def find_lone_surrogate(text: str) -> int | None:
    """Where a text first has half of a surrogate pair, which JSON and a command line can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also too many digits, too deep nesting
        raise TokenizerError(f"{file} is not valid JSON ({error}); copy it from the checkpoint again") from None
    return data if isinstance(data, dict) else {}


def _token_ids(file: Path, config: dict[str, Any], key: str) -> list[int]:
    """One id, several or none."""
    found = config.get(key)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise TokenizerError(f"{file}: {key} is {found!r}, need an integer from 0, a list of them or null; correct it")
    return ids
