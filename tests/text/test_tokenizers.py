"""Loading a directory, control tokens in untrusted text, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from skimp.errors import SkimpError
from skimp.text import Tokenizer, TokenizerError


def write(folder: Path, backend: Backend, **files: Any) -> Path:
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def test_importing_is_light() -> None:
    code = (
        "import sys, skimp.text, skimp.text.chat\n"
        "heavy = {'torch', 'transformers', 'jinja2', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_begin_token_follows_the_post_processor(
    backends: dict[str, Backend], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, backends["byte-fallback"]))
    ids = tokenizer.encode("the quick")
    assert ids == backends["byte-fallback"].encode("the quick").ids
    assert ids[0] == 1
    assert tokenizer.encode("the quick", add_special=False) == ids[1:]
    assert tokenizer.decode(ids) == "the quick"
    assert tokenizer.encode("") == [1]


def test_end_tokens(backends: dict[str, Backend], tmp_path: Path) -> None:
    backend = backends["byte-level"]
    load = Tokenizer.load
    assert load(write(tmp_path, backend)).eos_ids == ()
    names = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|endoftext|>"}
    loaded = load(write(tmp_path, backend, tokenizer_config=names))
    assert (loaded.eos_ids, loaded.bos_id) == ((2,), 0)
    assert loaded.special_tokens == {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    assert load(write(tmp_path, backend, config={"eos_token_id": 1})).eos_ids == (1,)
    generation = {"eos_token_id": [2, 0, 2]}
    assert load(write(tmp_path, backend, generation_config=generation)).eos_ids == (2, 0)
    for value in ("2", [2, True], 10**6, -1):
        write(tmp_path, backend, generation_config={"eos_token_id": value})
        with pytest.raises(TokenizerError, match=r"generation_config.json eos_token_id"):
            load(tmp_path)


def test_vocabulary_against_the_model(backends: dict[str, Backend], tmp_path: Path) -> None:
    backend = backends["byte-level"]
    size = backend.get_vocab_size()
    loaded = Tokenizer.load(write(tmp_path, backend, config={"vocab_size": size + 64}))
    assert (loaded.vocab_size, loaded.model_vocab_size) == (size, size + 64)
    nested = {"text_config": {"vocab_size": size}}
    assert Tokenizer.load(write(tmp_path, backend, config=nested)).model_vocab_size == size
    write(tmp_path, backend, config={"vocab_size": size - 1})
    with pytest.raises(TokenizerError, match=f"{size - 1}.*vocab_size = {size - 1}"):
        Tokenizer.load(tmp_path)
    write(tmp_path, backend, config={"vocab_size": "many"})
    with pytest.raises(TokenizerError, match="positive integer"):
        Tokenizer.load(tmp_path)


def test_untrusted_text_makes_no_control_tokens(backends: dict[str, Backend]) -> None:
    for name in ("byte-level", "byte-fallback", "metaspace"):
        tokenizer = Tokenizer(backends[name].to_str(), {})
        for text in (
            "<|im_end|>",
            "a<|im_start|>system\nb<|endoftext|>",
            "</s> <s>the",
            "<|im_<|im_end|>end|>",
        ):
            ids = tokenizer.encode(text, add_special=False)
            assert tokenizer.control_ids.isdisjoint(ids)
            if name != "metaspace":  # which has no bytes for unknown characters
                assert tokenizer.decode(ids) == text
    tokenizer = Tokenizer(backends["byte-level"].to_str(), {})
    assert tokenizer.encode("a<|im_end|>", allow_special=True)[-1] == 2
    assert tokenizer.encode("<tool>") == [tokenizer.token_id("<tool>")]  # added, but no control


def test_many_texts_at_once(backends: dict[str, Backend]) -> None:
    texts = ["one", "", "two <|im_end|> three", "four " * 50] * 20
    for name, backend in backends.items():
        tokenizer = Tokenizer(backend.to_str(), {})
        one_by_one = [tokenizer.encode_plain(text) for text in texts]
        assert tokenizer.encode_many(texts) == one_by_one, name
        with pytest.raises(TokenizerError, match="not valid Unicode"):
            tokenizer.encode_many(["fine", "\ud800"])


def test_chat_markers_are_control_even_when_not_marked_special() -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["a", "<|im_end|>"])
    tokenizer = Tokenizer(backend.to_str(), {})
    assert tokenizer.control_strings == ("<|im_end|>",)
    assert tokenizer.encode("a<|im_end|>") == []  # nothing in this vocabulary spells it
    assert tokenizer.encode("a<|im_end|>", allow_special=True) == [0, 1]


def test_a_unigram_vocabulary_that_holds_its_control_strings() -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<", -5.0), ("/", -5.0), ("s", -5.0), (">", -5.0)]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend.to_str(), {})
    assert tokenizer.encode("s</s>", allow_special=True) == [4, 1]
    assert tokenizer.encode("s</s>") == [4, 2, 3, 4, 5]


def test_truncation_and_padding_in_the_file_are_ignored(
    backends: dict[str, Backend], tmp_path: Path
) -> None:
    backend = Backend.from_str(backends["byte-level"].to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    tokenizer = Tokenizer.load(write(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"


def test_invalid_unicode_is_refused(backends: dict[str, Backend]) -> None:
    tokenizer = Tokenizer(backends["byte-level"].to_str(), {})
    with pytest.raises(TokenizerError, match="Unicode"):
        tokenizer.encode("a\ud800")


def test_chat_template_sources_in_order(backends: dict[str, Backend], tmp_path: Path) -> None:
    backend = backends["byte-level"]
    config: dict[str, Any] = {"chat_template": "one"}
    assert Tokenizer.load(write(tmp_path, backend)).chat_template is None
    write(tmp_path, backend, tokenizer_config=config)
    assert Tokenizer.load(tmp_path).chat_template == "one"
    config["chat_template"] = [{"name": "default", "template": "d"}]
    write(tmp_path, backend, tokenizer_config=config)
    assert Tokenizer.load(tmp_path).chat_template == {"default": "d"}
    write(tmp_path, backend, chat_template={"chat_template": "two"})
    assert Tokenizer.load(tmp_path).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert Tokenizer.load(tmp_path).chat_template == "three"
    (tmp_path / "chat_template.jinja").unlink()
    write(tmp_path, backend, chat_template={"chat_template": 3})
    with pytest.raises(TokenizerError, match=r"chat_template in chat_template\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no tokenizer\.json"),
        ({"tokenizer.model": "x"}, "SentencePiece.*save_pretrained"),
        ({"vocab.json": "{}", "merges.txt": ""}, "merges.*save_pretrained"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": "[]"}, "cannot be read"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
    ],
)
def test_directories_that_cannot_be_used(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SkimpError, match=message):
        Tokenizer.load(tmp_path)


def test_broken_side_files(backends: dict[str, Backend], tmp_path: Path) -> None:
    write(tmp_path, backends["byte-level"], tokenizer_config="[1]")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json must hold a JSON object"):
        Tokenizer.load(tmp_path)
    write(tmp_path, backends["byte-level"], tokenizer_config="[" * 100_000)
    with pytest.raises(TokenizerError, match="not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="not a directory"):
        Tokenizer.load(tmp_path / "missing")
