"""Text to ids and back, and text as it comes.

Catches: half a UTF-8 character shown, text lost or doubled between the pieces, spaces of sentencepiece-like tokenizers
dropped at the seams, a prompt of another length than asked, special tokens written twice by the chat template.
"""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from common.config import SHAPES
from common.errors import UserError
from common.tokenizer import ByteTokenizer, IncrementalDecoder, PretrainedTokenizer

TINY = SHAPES["tiny"]
BYTES = ByteTokenizer(TINY)


def save(folder, tokenizer: Tokenizer, **config) -> PretrainedTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings_ = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    return PretrainedTokenizer(folder, TINY)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """As Llama 3's and SmolLM2's: one id a byte, a few merges across characters, two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ã", "¼"), ("ð", "Ł")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
    )
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return save(tmp_path_factory.mktemp("byte_level"), tokenizer, chat_template=template)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """As Llama 2's: pieces with ▁ for a space, single bytes for characters that no piece has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "a", "b", "c", "▁a"]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return save(tmp_path_factory.mktemp("byte_fallback"), tokenizer)


def pieces_of(tokenizer, ids):
    decoder = IncrementalDecoder(tokenizer)
    return [decoder.push(i) for i in ids], decoder.finish()


def check_incremental(tokenizer, ids):
    pieces, rest = pieces_of(tokenizer, ids)
    whole = tokenizer.decode(ids)
    assert "".join(pieces) + rest == whole
    return pieces, whole


@settings(deadline=None, max_examples=150)
@given(st.text())
def test_text_of_any_unicode_comes_whole(byte_level, text):
    for tokenizer in (BYTES, byte_level):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        pieces, _ = check_incremental(tokenizer, ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)  # never a part of a character


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 511), max_size=40))
def test_any_ids_concatenate_to_their_text(byte_level, ids):
    check_incremental(BYTES, ids)
    check_incremental(byte_level, [i % 262 for i in ids])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0x41, 0xFF]), max_size=30))
def test_broken_utf8_concatenates_too(byte_level, data):
    """Bytes that are nearly characters: the hard case, where what is held back may still become one."""
    check_incremental(BYTES, [b + 3 for b in data])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ids = [byte_level._hf.convert_tokens_to_ids(c) for c in alphabet]
    assert len(ids) == 256
    check_incremental(byte_level, [ids[b] for b in data])


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="abc the é€😀", max_size=30))
def test_pieces_with_byte_fallback_keep_their_spaces(byte_fallback, text):
    """A character's bytes stand between pieces here, so none is broken; only the seams are tested."""
    ids = byte_fallback.encode("a" + text)
    ids = [i for i in ids if i > 2]
    pieces, rest = pieces_of(byte_fallback, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    got = "".join(pieces) + rest
    assert got == byte_fallback.decode(ids) == "a" + text


def test_a_character_is_shown_with_its_last_byte():
    decoder = IncrementalDecoder(BYTES)
    shown = [decoder.push(i) for i in BYTES.encode("a€😀")]
    assert shown == ["a", "", "", "€", "", "", "", "😀"]


def test_broken_bytes_are_not_held_for_ever(byte_level):
    for tokenizer in (BYTES, byte_level):
        decoder = IncrementalDecoder(tokenizer)
        ids = tokenizer.encode("é")[:1] * 50
        shown = "".join(decoder.push(i) for i in ids)
        assert len(shown) >= 46 and set(shown) == {"\ufffd"}


def test_the_byte_tokenizer_shows_a_mark_for_every_id():
    for i in range(TINY.vocab_size):
        text = BYTES.decode([i])
        assert text and (text.isprintable() or i - 3 < 128)
    with pytest.raises(UserError, match="vocab_size 100"):
        ByteTokenizer(type(TINY)(100, 8, 8, 1, 1, 1, 8))


@pytest.mark.parametrize("length", [1, 2, 17, 5000, 20000])
def test_prompts_have_exactly_the_length_asked(byte_level, length):
    for tokenizer in (BYTES, byte_level):
        ids = tokenizer.prompt_of_length(length)
        assert len(ids) == length and all(isinstance(i, int) for i in ids)
        shifted = tokenizer.prompt_of_length(length, 97)
        assert shifted[: max(0, length - 97)] == ids[97:]  # the same text, from another place
        assert length < 3 or shifted != ids


def test_chat_goes_through_the_template_once(byte_level):
    start, end = (byte_level._hf.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    ids = byte_level.chat("the hü")
    expected = [start, *byte_level.encode("user\nthe hü"), end, *byte_level.encode("\n")]
    assert ids == [*expected, start, *byte_level.encode("assistant\n")]
    assert byte_level.decode(ids) == "user\nthe hü\nassistant\n"  # special tokens are left out


def test_without_a_template_chat_is_the_plain_text(byte_fallback):
    assert byte_fallback.chat("a b") == byte_fallback.encode("a b")
    assert BYTES.chat("a b") == BYTES.encode("a b")


def test_the_embedded_tokenizer_incrementally(embedded):
    """Ids of real text and random ones, on the tokenizer that the demo uses."""
    _, tokenizer = embedded
    rng = random.Random(0)
    texts = ["2024 + 17 = 2041, naïve café — 東京タワー 🇫🇷👩‍👩‍👧 \u202eabc", "def f(x):\n    return x\n\n\n"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        pieces, _ = check_incremental(tokenizer, ids)
        assert not any("\ufffd" in piece for piece in pieces)
    for _ in range(30):
        check_incremental(tokenizer, [rng.randrange(49152) for _ in range(60)])


def test_broken_tokenizer_files_are_one_line(tmp_path):
    for text in ("", "{", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(text)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        with pytest.raises(UserError, match="tokenizer cannot be read") as caught:
            PretrainedTokenizer(tmp_path, TINY)
        assert "\n" not in str(caught.value) and str(caught.value).endswith("; fetch tokenizer.json anew")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="; add tokenizer.json$"):
        PretrainedTokenizer(tmp_path, TINY)
