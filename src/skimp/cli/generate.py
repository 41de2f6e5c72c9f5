"""``skimp generate``: one prompt in, text out as it comes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skimp.cli import options as opt

if TYPE_CHECKING:
    from skimp.decoding.params import SamplingParams
    from skimp.engine import Engine, RequestOutput

DEFAULT_MAX_TOKENS = 256


def generate(
    model: opt.ModelArgument,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads standard input.")
    ],
    max_tokens: opt.MaxTokens = None,
    temperature: opt.Temperature = 1.0,
    top_k: opt.TopK = 0,
    top_p: opt.TopP = 1.0,
    min_p: opt.MinP = 0.0,
    seed: opt.Seed = None,
    n: Annotated[int, typer.Option("--n", help="Independent samples.", metavar="N")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="End at this token; may be repeated.", metavar="ID")
    ] = None,
    include_stop: Annotated[
        bool, typer.Option("--include-stop", help="Keep the stop text in the output.")
    ] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's end token.")
    ] = False,
    min_tokens: Annotated[int, typer.Option(help="No end before this many.", metavar="N")] = 0,
    presence_penalty: Annotated[float, typer.Option(help="-2 to 2.", metavar="X")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="-2 to 2.", metavar="X")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.", metavar="X")] = 1.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(help="Add to a token's logit; may be repeated.", metavar="ID=BIAS"),
    ] = None,
    bad_word: Annotated[
        list[str] | None, typer.Option(help="Never write this text; may be repeated.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: this many alternatives a token.", metavar="N"),
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option(help="The same for the prompt's tokens.", metavar="N")
    ] = None,
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
    deterministic: opt.Deterministic = False,
    json_output: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Continue a prompt, streaming the text.

    A line on stderr says how fast it went, what the cost model predicted, and which part of the
    memory-bandwidth limit that is.

    \b
    Examples:
      skimp generate tales "Once upon a time" --max-tokens 200 --seed 7
      skimp generate ./model - --temperature 0 --json < prompt.txt
      skimp generate tales "The fox" --stop "." --top-p 0.9 --n 3
      skimp generate tales "The fox" --speculate draft --draft-model tales-draft
    """
    from skimp.cli.models import load_engine
    from skimp.cli.output import note, print_json, read_prompt
    from skimp.cost.machine import busy_note
    from skimp.decoding.params import SamplingParams

    if (logprobs is not None or prompt_logprobs is not None) and not json_output:
        raise ValueError("logprobs: shown only with --json")
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        logit_bias=parse_bias(logit_bias or []),
        bad_words=tuple(bad_word or ()),
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        ignore_eos=ignore_eos,
        include_stop=include_stop,
        seed=seed,
        n=n,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    engine_options = opt.engine_options(
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
        deterministic=deterministic,
        max_batch=max(8, n),
    )
    text = read_prompt(prompt)
    engine = load_engine(model, engine_options)
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(text)
    if max_tokens is None:
        params = clip_max_tokens(engine, ids, replace(params, max_tokens=DEFAULT_MAX_TOKENS))
    live = not json_output and n == 1
    output, speed = stream(engine, ids, params, echo=live)
    if output.error:
        raise ValueError(output.error)
    if json_output:
        print_json(as_dict(output, speed))
        return
    if n > 1:
        for completion in output.outputs:
            print(f"[{completion.index + 1} of {n}]\n{completion.text}", flush=True)
    if not quiet:
        note(speed_line(engine, output, speed))
        if (warning := busy_note()) is not None:
            note(f"note: {warning}")


def clip_max_tokens(engine: Engine, prompt: list[int], params: SamplingParams) -> SamplingParams:
    """A default that nobody asked for gives way to what the context still holds."""
    room = engine.max_context - len(prompt)
    if params.max_tokens is None or params.max_tokens <= room or room < 1:
        return params
    return replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds to the first token, and from there to the last; steps between them."""

    first_token_s: float
    generation_s: float
    tokens: int
    steps: int

    @property
    def tokens_per_s(self) -> float:
        """Of generation alone; of the whole when there is only one token."""
        if self.steps and self.generation_s > 0:
            return self.tokens / self.generation_s
        return 1.0 / self.first_token_s if self.first_token_s > 0 else 0.0


def stream(
    engine: Engine, prompt: list[int], params: SamplingParams, *, echo: bool
) -> tuple[RequestOutput, Speed]:
    """Runs one request to its end, writing text as it comes if ``echo``."""
    start = time.perf_counter()
    first = last = None
    steps = at_first = 0
    output = None
    for output in engine.stream(prompt, params):
        now = time.perf_counter()
        if first is None:
            first, at_first = now, _count(output)
        else:
            steps += 1
        last = now
        if echo and output.delta:
            sys.stdout.write(output.delta)
            sys.stdout.flush()
    assert output is not None and first is not None and last is not None
    if echo:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return output, Speed(
        first_token_s=first - start,
        generation_s=last - first,
        tokens=_count(output) - at_first,
        steps=steps,
    )


def _count(output: RequestOutput) -> int:
    return sum(len(completion.token_ids) for completion in output.outputs)


def as_dict(output: RequestOutput, speed: Speed) -> dict[str, Any]:
    """The ``--json`` object; ``outputs`` lists every sample when there are several."""
    from skimp.cli.output import json_ready

    first = output.outputs[0]
    found: dict[str, Any] = {
        "text": first.text,
        "token_ids": list(first.token_ids),
        "finish_reason": first.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": _count(output),
        "tokens_per_s": speed.tokens_per_s,
        "first_token_s": speed.first_token_s,
    }
    if first.logprobs is not None:
        found["logprobs"] = json_ready(first.logprobs)
    if output.prompt_logprobs is not None:
        found["prompt_logprobs"] = json_ready(output.prompt_logprobs)
    if len(output.outputs) > 1:
        found["outputs"] = [
            {
                "index": c.index,
                "text": c.text,
                "token_ids": list(c.token_ids),
                "finish_reason": c.finish_reason,
                **({"logprobs": json_ready(c.logprobs)} if c.logprobs is not None else {}),
            }
            for c in output.outputs
        ]
    return found


def speed_line(engine: Engine, output: RequestOutput, speed: Speed) -> str:
    """Measured beside predicted, and the part of the limit. The first run on a machine measures
    the machine, which takes some seconds."""
    from skimp.cli.output import percent, rate_text
    from skimp.cost import SequenceStep, predict, step_cost
    from skimp.meter.calibrate import engine_hardware

    tokens = _count(output)
    head = f"[{tokens} token{'' if tokens == 1 else 's'}, first after {speed.first_token_s:.2f} s"
    if not speed.steps:
        return head + "]"
    hardware = engine_hardware(engine)
    steps = [
        SequenceStep(context=len(output.prompt_token_ids) + max(1, len(c.token_ids) // 2))
        for c in output.outputs
    ]
    cost = step_cost(engine.work, steps)
    step_s = speed.generation_s / speed.steps
    predicted = len(steps) / predict(cost, hardware).seconds
    if engine.options.speculate != "none":
        return (
            f"{head}; {rate_text(speed.tokens_per_s)} tokens/s generating, "
            f"{engine.speculation.tokens_per_step:.2f} tokens a step of a sequence; "
            f"{rate_text(predicted)} predicted without guesses]"
        )
    return (
        f"{head}; {rate_text(speed.tokens_per_s)} tokens/s generating, "
        f"{rate_text(predicted)} predicted, "
        f"{percent(hardware.limit_s(cost) / step_s)} of the memory-bandwidth limit]"
    )


def parse_bias(entries: list[str]) -> dict[int, float]:
    """``ID=BIAS`` entries. ValueError names the one that is not."""
    found: dict[int, float] = {}
    for entry in entries:
        token, sign, bias = entry.partition("=")
        try:
            if not sign:
                raise ValueError
            found[int(token)] = float(bias)
        except ValueError:
            raise ValueError(f"logit_bias: {entry!r} is not ID=BIAS, such as 42=-5") from None
    return found
