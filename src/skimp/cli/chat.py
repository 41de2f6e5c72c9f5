"""``skimp chat``: a conversation, interactive or piped, a line a turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from skimp.cli import options as opt

if TYPE_CHECKING:
    from skimp.decoding.params import SamplingParams
    from skimp.engine import Engine

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer."
COMMANDS = ("/reset", "/quit", "/exit", "/help")
Message = dict[str, str]
Encoder = Callable[[list[Message]], list[int]]


def chat(
    model: opt.ModelArgument,
    system: Annotated[
        str | None, typer.Option(help="A system message to begin with.", show_default=False)
    ] = None,
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = 0.8,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 0.95,
    min_p: opt.MinP = 0.0,
    seed: opt.Seed = None,
    dtype: opt.DType = "auto",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    backend: opt.Backend = "auto",
    cache_dtype: opt.CacheDType = "auto",
    speculate: opt.Speculate = "none",
    draft_model: opt.DraftModel = None,
    draft_tokens: opt.DraftTokens = None,
    draft_rule: opt.DraftRule = None,
    max_context: opt.MaxContext = None,
) -> None:
    """Talk with a model. /reset starts over, /quit leaves.

    The model's own chat template is used, or ChatML if it has none. With standard input piped,
    each line is a turn and the answers go to standard output. When the conversation outgrows the
    context its oldest turns are dropped, with a note.

    \b
    Examples:
      skimp chat tales --system "You tell short stories."
      printf 'Hello.\\nWhat did I say?\\n' | skimp chat tales --seed 7
    """
    from skimp.cli.generate import DEFAULT_MAX_TOKENS
    from skimp.cli.models import chat_encoder, load_engine
    from skimp.cli.output import note
    from skimp.decoding.params import SamplingParams
    from skimp.errors import RequestError

    params = SamplingParams(
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
    )
    options = opt.engine_options(
        dtype=dtype,
        device=device,
        threads=threads,
        backend=backend,
        cache_dtype=cache_dtype,
        speculate=speculate,
        draft_model=draft_model,
        draft_tokens=draft_tokens,
        draft_rule=draft_rule,
        max_context=max_context,
        max_batch=2,
    )
    engine = load_engine(model, options)
    encode = chat_encoder(engine)
    interactive = sys.stdin.isatty()
    if interactive:
        note(f"{model}. {HELP}")
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    while (line := _read(interactive)) is not None:
        command = line.strip()
        if not command:
            continue
        if command.startswith("/"):
            if command in ("/quit", "/exit"):
                return
            if command == "/reset":
                messages = list(start)
                note("[the conversation is forgotten]")
            else:
                note(HELP if command == "/help" else f"[no command {command}; {HELP}]")
            continue
        messages.append({"role": "user", "content": line})
        dropped = len(messages)
        messages = fit(engine, encode, messages, params, keep=len(start))
        dropped -= len(messages)
        if dropped:
            note(f"[the {dropped} oldest messages no longer fit the context and are dropped]")
        try:
            answer = _answer(engine, encode(messages), params, interactive=interactive)
        except RequestError as error:
            if not interactive:
                raise
            note(f"[{error}]")  # a message that is too long should not end the conversation
            answer = None
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _read(interactive: bool) -> str | None:
    """The next line without its end; None at the end of input."""
    if interactive:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    data = sys.stdin.buffer.readline()
    if not data:
        return None
    try:
        return data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8 at byte {error.start} of a line") from None


def fit(
    engine: Engine,
    encode: Encoder,
    messages: list[Message],
    params: SamplingParams,
    *,
    keep: int,
) -> list[Message]:
    """The messages without their oldest turns, until prompt and answer fit the context.

    The first ``keep`` (the system message) and the last stay, whatever their length.
    """
    # An answer is worth dropping old turns for, but not for more than a quarter of the context.
    room = engine.max_context - min(params.max_tokens or 1, engine.max_context // 4)
    while len(messages) > keep + 2 and len(encode(messages)) > room:
        messages = [*messages[:keep], *messages[keep + 2 :]]
    return messages


def _answer(
    engine: Engine, prompt: list[int], params: SamplingParams, *, interactive: bool
) -> str | None:
    """Streams an answer and returns it; None if it was stopped."""
    from skimp.cli.generate import clip_max_tokens, stream

    try:
        output, _ = stream(engine, prompt, clip_max_tokens(engine, prompt, params), echo=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
        print(" [stopped]", flush=True)
        return None
    if output.error:
        raise ValueError(output.error)
    return output.outputs[0].text
