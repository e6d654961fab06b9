"""The tokenizer in a file is the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path

from qwen_export.opening import open_checkpoint
from qwen_runtime.template import read_templates
from qwen_runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as FileTokenizer

from tests.support.gguf_checkpoints import write_gguf

DENSE = Path("tests/checkpoints/tiny-dense").resolve()
TEXTS = [
    (DENSE.parent / "eval.txt").read_text()[:4000],
    "<|im_start|>user\nHéllo wörld 123 你好 e\u0301 नमस्ते 🚀  \n\n x<|im_end|>\n<think>\n</think>",
    "cafe\u0301 \u1112\u1161\u11ab a\u0316\u0300 न\u093c\u200d 👩\u200d👧 ☎\ufe0f",  # not composed
    "<tool_call>{\"a\": 1}</tool_call>\t\tI'M we'Ve  \r\n  <|endoftext|>",
    "",
]


def test_ids_are_the_checkpoints(tmp_path: Path) -> None:
    found = open_checkpoint(str(write_gguf(DENSE, tmp_path / "model.gguf"))).root
    ours, theirs = Tokenizer.open(found), Tokenizer.open(DENSE)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for special in (False, True):
            assert ours.decode(ids, special) == theirs.decode(ids, special)
    both = [FileTokenizer.from_file(str(root / "tokenizer.json")) for root in (found, DENSE)]
    vocabulary, expected = (one.get_vocab(with_added_tokens=True) for one in both)
    assert vocabulary == expected
    assert [(id, str(token)) for id, token in both[0].get_added_tokens_decoder().items()] == [
        (id, str(token)) for id, token in both[1].get_added_tokens_decoder().items()
    ]
    assert read_templates(found) == read_templates(DENSE)
    settings, meant = (json.loads((root / "tokenizer_config.json").read_text()) for root in (found, DENSE))
    assert {key: meant[key] for key in settings} == settings


def test_added_tokens_keep_their_ids_wherever_they_stand(tmp_path: Path) -> None:
    content = json.loads((DENSE / "tokenizer.json").read_text())
    size = len(content["model"]["vocab"]) + len(content["added_tokens"])
    kinds = [1] * len(content["model"]["vocab"]) + [4] * len(content["added_tokens"])
    kinds[0], kinds[-1] = 4, 5  # "!" is an added token, and the last one fills the list up
    file = write_gguf(DENSE, tmp_path / "model.gguf", metadata={"tokenizer.ggml.token_type": kinds})
    found = Tokenizer.open(open_checkpoint(str(file)).root)
    theirs = Tokenizer.open(DENSE)
    assert found.encode("a!<think>b") == theirs.encode("a!<think>b")
    assert found.largest_id == size - 2


def test_templates_of_several_names(tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template.tool_use": "{{ tools }}"}
    found = open_checkpoint(str(write_gguf(DENSE, tmp_path / "model.gguf", metadata=metadata))).root
    assert read_templates(found) == {**read_templates(DENSE), "tool_use": "{{ tools }}"}
