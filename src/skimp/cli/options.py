"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from skimp.engine.options import EngineOptions

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory, Hub id or embedded model.")
]
DType = Annotated[
    str, typer.Option(help="auto (the checkpoint's), float32 or bfloat16.", metavar="NAME")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.", metavar="NAME")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; all by default.", metavar="N", show_default=False)
]
Backend = Annotated[
    str, typer.Option(help="auto, native, triton or plain kernels.", metavar="NAME")
]
CacheDType = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's), bfloat16, float32, fp8, int8 or int4: what the cache "
        "rounds to.",
        metavar="NAME",
    ),
]
MaxContext = Annotated[
    str | None,
    typer.Option(
        help="Longest sequence, e.g. 2048 or 32k; the model's own by default.",
        metavar="TOKENS",
        show_default=False,
    ),
]
Batches = Annotated[
    list[str] | None,
    typer.Option(
        help="Sequences at once: 1,8,32; max: as many as --cache-bytes holds; repeatable.",
        metavar="N[,N...]",
        show_default="1",
    ),
]
CacheBytes = Annotated[
    str | None,
    typer.Option(
        help="Memory of the cache, the same for every model, e.g. 256m or 2g.",
        metavar="SIZE",
        show_default=False,
    ),
]
Speculate = Annotated[
    str,
    typer.Option(
        help="none, lookup, suffix, draft or head: guess tokens, check several at once.",
        metavar="NAME",
    ),
]
DraftTokens = Annotated[
    int | None,
    typer.Option(help="Guess at most so many, fewer where it does not pay; 8.", metavar="N"),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        help="With --speculate draft or head: the smaller model or the head that guesses.",
        metavar="MODEL",
    ),
]
DraftRule = Annotated[
    str | None,
    typer.Option(help="With --speculate draft or head: block, chain or match.", metavar="NAME"),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Same tokens whatever else runs, bit for bit.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no speed line.")]

Temperature = Annotated[float, typer.Option(help="0 is greedy.", metavar="T")]
TopK = Annotated[int, typer.Option(help="Keep the K likeliest tokens; 0: all.", metavar="K")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens of mass P.", metavar="P")]
MinP = Annotated[float, typer.Option(help="Keep tokens at least P times the best.", metavar="P")]
Seed = Annotated[
    int | None,
    typer.Option(help="Makes sampling repeatable.", metavar="N", show_default=False),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens to generate; 256 by default, or fewer if the context ends.",
        metavar="N",
        show_default=False,
    ),
]


def parse_count(text: str, field: str, *, units: str = "km", example: str = "4096 or 32k") -> int:
    """A count such as ``4096``, ``32k`` (of 1024) or ``1m``. ``units`` are the letters it may end
    in, each 1,024 of the one before. ValueError names ``field``."""
    body = text.strip().lower().replace("_", "")
    factor = 1 << 10 * (units.find(body[-1:]) + 1 if body else 0)
    digits = body[:-1] if factor > 1 else body
    if not digits.isascii() or not digits.isdigit() or len(digits) > 12 or int(digits) == 0:
        raise ValueError(f"{field}: {text!r} is not a count such as {example}")
    return int(digits) * factor


def parse_counts(values: list[str], field: str) -> list[int]:
    """Counts from repeated options and comma-separated lists, in order, each once."""
    counts = [parse_count(part, field) for value in values for part in value.split(",")]
    return list(dict.fromkeys(counts))


def parse_batches(values: list[str]) -> list[int | None]:
    """Batches like :func:`parse_counts`; ``max`` is None."""
    parts = dict.fromkeys(part.strip().lower() for value in values for part in value.split(","))
    return list(
        dict.fromkeys(None if part == "max" else parse_count(part, "batch") for part in parts)
    )


def parse_bytes(text: str | None) -> int | None:
    """Bytes such as ``256m`` or ``2g`` (of 1024). ValueError for more than a cache can have."""
    from skimp.cache import MOST_BYTES

    if text is None:
        return None
    found = parse_count(text, "cache_bytes", units="kmg", example="256m or 2g")
    if found > MOST_BYTES:
        raise ValueError(f"cache_bytes: {text} exceeds the {MOST_BYTES:,} bytes a cache can have")
    return found


def engine_options(**values: Any) -> EngineOptions:
    """Engine options from those that were given; None means the engine's own default."""
    from skimp.engine.options import EngineOptions

    context = values.get("max_context")
    if isinstance(context, str):
        values["max_context"] = parse_count(context, "max_context")
    return EngineOptions(**{k: v for k, v in values.items() if v is not None})
