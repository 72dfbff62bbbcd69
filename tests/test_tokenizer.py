"""`Tokenizer`: encoding, end tokens, chat tokens and the streaming decoder."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from v4jax.chat import ASSISTANT, BOS, END_THINK, EOS, USER
from v4jax.tokenizer import Tokenizer, TokenizerError

SPECIAL = [BOS, EOS]
ADDED = [USER, ASSISTANT, "<think>", END_THINK]


def byte_level():
    """A byte-level BPE tokenizer like the released one: two special tokens, role tokens that are merely added."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(["der Hund, the dog, 犬, 🐕 and the cat"] * 8, trainer)
    backend.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in ADDED])
    return backend


def with_spaces():
    """A tokenizer that marks spaces, whose decoder drops the first one: decoding token by token would lose them all."""
    words = {"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Metaspace()
    return backend


TOKENIZER = Tokenizer(byte_level())


@pytest.fixture
def directory(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@given(st.text())
def test_decoding_undoes_encoding(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.text(max_size=20), max_size=4))
def test_a_batch_is_encoded_as_its_texts(texts):
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_role_tokens_in_a_text_are_single_ids():
    ids = TOKENIZER.encode_chat([{"role": "user", "content": "the dog"}])
    roles = [TOKENIZER.backend.token_to_id(token) for token in (BOS, USER, ASSISTANT, END_THINK)]
    assert (ids[:2], ids[-2:]) == (roles[:2], roles[2:])
    assert TOKENIZER.decode(ids) == f"{BOS}{USER}the dog{ASSISTANT}{END_THINK}"
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == f"{USER}the dog{ASSISTANT}{END_THINK}"


def test_add_bos_puts_the_start_token_first():
    assert TOKENIZER.encode("a", add_bos=True) == [TOKENIZER.bos_token_id, *TOKENIZER.encode("a")]


# ---- streaming -------------------------------------------------------------------------------------------------------
def streamed(tokenizer, ids, **options):
    stream = tokenizer.stream(**options)
    return [*map(stream.push, ids), stream.finish()]


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40), st.booleans())
def test_streamed_pieces_add_up_to_the_decoded_text_for_any_tokens(ids, is_skipping):
    pieces = streamed(TOKENIZER, ids, skip_special_tokens=is_skipping)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=is_skipping)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_streamed_text_never_has_part_of_a_character(text):
    pieces = streamed(TOKENIZER, TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def byte_tokens(text):
    """One token per byte, whatever the merges."""
    ((letters, _),) = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [TOKENIZER.backend.token_to_id(letter) for letter in letters]


def test_a_character_of_several_tokens_comes_out_with_its_last_one():
    ids = byte_tokens("🐕")
    assert TOKENIZER.decode(ids) == "🐕"
    assert streamed(TOKENIZER, ids) == ["", "", "", "🐕", ""]


def test_an_open_character_comes_out_at_the_end_as_the_replacement_character():
    ids = TOKENIZER.encode("a") + byte_tokens("🐕")[:2]
    assert streamed(TOKENIZER, ids) == ["a", "", "", "\ufffd"]


def test_streaming_keeps_the_spaces_of_a_word_level_decoder():
    tokenizer = Tokenizer(with_spaces())
    assert streamed(tokenizer, [0, 1, 2, 0]) == ["a", " b", "c", " a", ""]


# ---- directories -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("configs", "ends"),
    [
        ({}, (1,)),
        ({"config.json": {"eos_token_id": 7}}, (7,)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [1, 7, 9]}}, (1, 7, 9)),
        ({"config.json": {"eos_token_id": None}}, (1,)),
    ],
    ids=["looked up", "config", "generation config first", "null"],
)
def test_end_tokens_come_from_the_config_files_or_the_vocabulary(directory, configs, ends):
    for name, config in configs.items():
        (directory / name).write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.eos_token_ids == ends
    assert tokenizer.bos_token_id == 0


@pytest.mark.parametrize("ids", [0.5, "</s>", [[1]], {"id": 1}, True, -1, [1, -1]], ids=str)
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_special_tokens_that_are_no_ids_are_refused(directory, key, ids):
    (directory / "generation_config.json").write_text(json.dumps({key: ids}))
    with pytest.raises(TokenizerError, match=rf"generation_config\.json: {key} is .*, need an integer"):
        Tokenizer.from_directory(directory)


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer.json in .*copy it there"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 5000], ids=["open", "deep", "digits"])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_broken_file_is_refused(directory, name, text):
    (directory / name).write_text(text)
    with pytest.raises(TokenizerError, match=rf"{name} .*copy it from the checkpoint again"):
        Tokenizer.from_directory(directory)
