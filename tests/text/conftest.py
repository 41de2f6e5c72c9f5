"""Small tokenizers trained on the spot, and the optional shared folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Das schöne Mädchen läuft über die Straße, naïve café – 10 €.",
    "日本語のテキストと한국어 텍스트, русский текст, emoji 😀👍🏽 and\ttabs\n\nlines.",
]


def shared_folder() -> Path | None:
    """SKIMP_SHARED, or a folder ``shared`` beside the repository."""
    named = os.environ.get("SKIMP_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared"
    return folder if (folder / "data").is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip("no shared data folder")
    return folder / "data"


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<tool>"])
    return backend


def byte_fallback(*, metaspace: bool = False, strip: bool = True) -> Backend:
    """As the Llama-2 and Gemma tokenizers: ▁ for spaces and <0xNN> for unknown characters."""
    letters = sorted({c for text in CORPUS[:2] for c in text if c.isascii() and c != " "})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *letters]
    pairs = [("t", "h"), ("th", "e"), ("▁", "the"), ("o", "w"), ("▁", "q")]
    tokens += [a + b for a, b in pairs]
    backend = Backend(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=pairs,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
        backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


def word_piece() -> Backend:
    """A decoder that the stream does not know, so it takes the windowed path."""
    words = ["[UNK]", "the", "quick", "##er", "##s", "fox", ".", "é"]
    backend = Backend(
        models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


@pytest.fixture(scope="session")
def backends() -> dict[str, Backend]:
    return {
        "byte-level": byte_level(),
        "byte-fallback": byte_fallback(),
        "byte-fallback-no-strip": byte_fallback(strip=False),
        "metaspace": byte_fallback(metaspace=True),
        "word-piece": word_piece(),
    }
