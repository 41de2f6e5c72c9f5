"""``skimp price``: what changed models lose against their base, and what they gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skimp.cli import options as opt
from skimp.cli import speculation as guesses
from skimp.cli import tasks as asking

if TYPE_CHECKING:
    from skimp.engine.options import EngineOptions
    from skimp.meter.cases import Case
    from skimp.meter.price import Price
    from skimp.meter.retrieval import Retrieval
    from skimp.model.spec import ModelSpec

RECENT_S = 600.0


def price(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model that the others are held against.")
    ],
    outs: Annotated[
        list[str],
        typer.Argument(
            metavar="OUT...",
            help="Models made from it; MODEL@option=value,... sets an engine option of one, such "
            "as speculate.",
        ),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            "--text", help="UTF-8 text file; the packaged one by default.", metavar="FILE"
        ),
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Score only the beginning, e.g. 200k.", metavar="BYTES")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Longest window of text; what fits by default.", metavar="TOKENS"),
    ] = None,
    batch: opt.Batches = None,
    context: Annotated[
        list[str] | None,
        typer.Option(help="Prompt tokens: 128,1k; repeatable.", metavar="N[,N...]"),
    ] = None,
    cache_bytes: opt.CacheBytes = None,
    task: asking.Files = None,
    kind: asking.Kind = None,
    max_items: asking.MaxItems = None,
    shots: asking.Shots = None,
    max_tokens: asking.MaxTokens = None,
    template: asking.Template = None,
    stop: asking.Stop = None,
    chat: asking.Chat = False,
    retrieval: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask for pairs hidden in so many tokens: 256,1k; repeatable.",
            metavar="N[,N...]",
        ),
    ] = None,
    retrieval_items: Annotated[
        str | None, typer.Option(help="Prompts of each kind and length; 64.", metavar="N")
    ] = None,
    new_tokens: Annotated[
        int,
        typer.Option(
            help="Steps a round, of which the later half is timed; tokens of an answer where "
            "models guess.",
            metavar="N",
        ),
    ] = 48,
    rounds: Annotated[int, typer.Option(help="Rounds, models in turn.", metavar="N")] = 5,
    prompts: guesses.Files = None,
    category: guesses.Categories = None,
    max_prompts: guesses.MaxPrompts = None,
    temperature: guesses.Temperatures = None,
    dtype: opt.DType = "auto",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    backend: opt.Backend = "auto",
    seed: Annotated[int, typer.Option(help="Of prompts and intervals.", metavar="N")] = 0,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the table as Markdown too.", metavar="FILE")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with charts too.", metavar="FILE")
    ] = None,
    json_output: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Price models against their base: loss, bytes, and speed measured beside its prediction.

    The loss is bits per byte above the base's on the same text; a row whose 95 % interval holds
    zero is inside the noise. Tasks (see skimp eval) are asked of every model, and their scores
    compared item by item; --retrieval asks for what was said once, far back. Speed is measured in
    rounds that go through all models in turn, all loaded at once if memory holds them. --batch max
    times each model at the most sequences that --cache-bytes holds, and the gain is in tokens/s.
    A model with speculate loses nothing against itself without, which is to be named too; what its
    guesses gain is measured on real prompts, by category.

    \b
    Examples:
      skimp price tales ./tales-int4
      skimp price ./model ./int8 ./int4 --batch 1,8,32 --html price.html
      skimp price ./model ./int4 --task blimp.jsonl.xz --max-items 2000 --markdown price.md
      skimp price ./model ./local --retrieval 512,1k
      skimp price ./model ./gqa --cache-bytes 1g --batch 1,max --context 1k,8k
      skimp price ./model ./model@speculate=draft,draft_model=./int4 --prompts spec_bench.jsonl
    """
    from skimp.cli.evaluate import read_text
    from skimp.cli.models import model_spec
    from skimp.cli.output import note, print_json, progress_text
    from skimp.cost.machine import busy_note
    from skimp.meter.calibrate import engine_hardware
    from skimp.meter.cases import plan_cases
    from skimp.meter.price import Price
    from skimp.meter.report import as_markdown, as_text, write_html
    from skimp.meter.report.html import require_charts
    from skimp.meter.retrieval import Retrieval

    batches = opt.parse_batches(batch or ["1"])
    contexts = opt.parse_counts(context or ["128"], "context")
    memory = opt.parse_bytes(cache_bytes)
    if None in batches and memory is None:
        raise ValueError("batch: max needs the cache_bytes that every model shall fill")
    longest = None if window is None else opt.parse_count(window, "window")
    limit = None if max_bytes is None else opt.parse_count(max_bytes, "max_bytes")
    if rounds < 1:
        raise ValueError(f"rounds: at least 1, not {rounds}")
    asked = asking.read_tasks(
        task,
        seed=seed,
        kind=kind,
        max_items=max_items,
        shots=shots,
        max_tokens=max_tokens,
        template=template,
        stop=stop,
        chat=chat,
    )
    hidden = None
    if retrieval is not None:
        hidden = Retrieval(
            contexts=tuple(opt.parse_counts(retrieval, "retrieval")),
            items=opt.parse_count(retrieval_items or "64", "retrieval_items"),
        )
    else:
        asking.refuse("needs --retrieval", retrieval_items=retrieval_items)
    content = read_text(text)
    if html is not None:
        require_charts()
    given = {
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "backend": backend,
        "cache_bytes": memory,
    }
    entries: list[Entry] = []
    speculating: list[Entry] = []
    for name in [base, *outs]:
        model, changes = split_entry(name)
        if memory is not None and "cache_bytes" in changes:
            raise ValueError(f"cache_bytes: is the same for every model, and {name} has its own")
        options = opt.engine_options(**{**given, **changes})
        spec = model_spec(model)
        if options.speculate != "none":
            speculating.append(
                Entry(name=name, model=model, spec=spec, options=options, changes=changes)
            )
            continue
        positions = options.max_context or spec.max_positions
        if max(contexts) + new_tokens + 1 > positions:
            raise ValueError(
                f"context: {max(contexts)} and {new_tokens} new tokens do not fit the "
                f"{positions} positions of {model}"
            )
        if hidden is not None and max(hidden.contexts) >= positions:
            raise ValueError(
                f"retrieval: {max(hidden.contexts)} tokens and an answer do not fit the "
                f"{positions} positions of {model}"
            )
        cases, options = plan_cases(
            spec,
            options,
            batches,
            contexts,
            new_tokens,
            name=name,
            max_batch=changes.get("max_batch"),
            least_batch=asking.BATCH if task or hidden else 2,
        )
        entry = Entry(
            name=name, model=model, spec=spec, options=options, changes=changes, cases=cases
        )
        if hidden is not None and max(hidden.contexts) > (held := longest_window(entry, None)):
            raise ValueError(
                f"retrieval: {max(hidden.contexts)} tokens and an answer do not fit the "
                f"{options.cache_bytes:,} cache bytes of {name}, which hold {held}"
            )
        entries.append(entry)
    if speculating and speculating[0].name == base:
        raise ValueError(f"speculate: BASE is without guesses, and {base} is not")
    twins = plain_twins(entries, speculating)
    turns: list[list[Entry]] = []
    if speculating:
        real = guesses.read_asked(
            prompts,
            categories=category,
            max_prompts=max_prompts,
            temperatures=temperature,
            batches=batches,
            new_tokens=new_tokens,
            rounds=rounds,
            seed=seed,
        )
        if None in batches:
            note("note: what guesses gain is not measured at batch max, which is of random prompts")
        for together in twins:
            turns += fitting([timed(entry, real.batches) for entry in together])
    else:
        asking.refuse(
            "needs a model with speculate, such as BASE@speculate=lookup",
            prompts=prompts,
            category=category,
            max_prompts=max_prompts,
            temperature=temperature,
        )
    longest = min(longest_window(entry, longest) for entry in entries)
    groups = fitting(entries)
    prices = []
    with progress_text(not (quiet or json_output)) as progress:
        for group in groups:
            prices.append(
                _price(
                    group,
                    content,
                    asked,
                    hidden,
                    {"rounds": rounds, "context": longest, "max_bytes": limit, "seed": seed},
                    progress,
                )
            )
        found = Price.joined(prices)
        for plain, *guessing in turns:
            results = guesses.measure(
                plain.guessing,
                [entry.guessing for entry in guessing],
                real,
                partial(engine_hardware, max_age_s=RECENT_S),
                progress,
                note,
            )
            found = replace(found, speculation=(*found.speculation, *results))
    if markdown is not None:
        markdown.write_text(as_markdown(found), encoding="utf-8")
    if html is not None:
        write_html(found, html)
    if json_output:
        print_json(found.as_dict())
    else:
        print(as_text(found))
    for row in (found.base, *found.rows):
        for line in row.warnings:
            note(f"warning: {row.name}: {line}")
    if (warning := busy_note()) is not None:
        note(f"note: {warning}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model as it is named, the engine it shall have and which of its options are the entry's
    own, and what is timed of it, if its prompts are random."""

    name: str
    model: str
    spec: ModelSpec
    options: EngineOptions
    changes: dict[str, Any]
    cases: list[Case] = field(default_factory=list)

    @property
    def guessing(self) -> guesses.Guessing:
        return guesses.Guessing(name=self.name, model=self.model, options=self.options)

    @property
    def but_guesses(self) -> tuple[str, dict[str, Any]]:
        """The model, and those of its options that may change what it generates or how fast."""
        own = {k: v for k, v in self.changes.items() if not k.startswith(("speculate", "draft_"))}
        return self.model, own


def plain_twins(entries: Sequence[Entry], speculating: Sequence[Entry]) -> list[list[Entry]]:
    """Each model that is named with guesses too, and behind it how. ValueError names one whose law
    and speed without guesses no entry has."""
    found: dict[str, list[Entry]] = {}
    for entry in speculating:
        twin = next((e for e in entries if e.but_guesses == entry.but_guesses), None)
        if twin is None:
            model, own = entry.but_guesses
            listed = ",".join(f"{name}={value}" for name, value in own.items())
            raise ValueError(
                f"speculate: {entry.name} is held against {model}{f'@{listed}' if own else ''}, "
                "which is to be named too; to have it guess for another model, name that one with "
                f"speculate=draft,draft_model={model}"
            )
        found.setdefault(twin.name, [twin]).append(entry)
    return list(found.values())


def timed(entry: Entry, batches: Sequence[int]) -> Entry:
    """The entry with room for these batches and no more, unless it has chosen its own."""
    if "max_batch" in entry.changes:
        return entry
    return replace(entry, options=replace(entry.options, max_batch=max(2, *batches)))


def longest_window(entry: Entry, asked: int | None) -> int:
    """Tokens of the windows that text is read in: ``asked``, or what an engine's context and cache
    hold. Raises ValueError if a cache of chosen size does not hold a window."""
    from skimp.cache import Arena
    from skimp.cost.memory import largest
    from skimp.meter.work import engine_layout

    options = entry.options
    longest = asked or (options.max_context or entry.spec.max_positions) - 1
    if options.cache_bytes is None:
        return longest
    layout = engine_layout(entry.spec, options)
    arena = Arena(layout, options.cache_bytes, "meta")

    def fits(tokens: int) -> bool:
        return arena.could_hold(layout.pages_needed(tokens + 1, options.step_tokens))

    held = largest(fits, longest)
    if not held or (asked is not None and held < asked):
        raise ValueError(
            f"window: {longest} tokens do not fit the {options.cache_bytes:,} cache bytes of "
            f"{entry.name}, which hold {held}"
        )
    return held


def fitting(entries: Sequence[Entry]) -> list[list[Entry]]:
    """All models together if memory holds them, or else each with the base. Raises OptionError,
    before anything is loaded, if it does not hold even two."""
    from skimp.cli.models import model_spec
    from skimp.cli.output import bytes_text
    from skimp.errors import OptionError
    from skimp.meter.work import engine_bytes, free_memory

    free = free_memory(entries[0].options.device)
    need = [engine_bytes(entry.spec, entry.options, free) for entry in entries]
    for index, entry in enumerate(entries):
        draft = entry.options.draft_model
        if draft is not None and entry.options.speculate == "draft":  # a head is but a layer
            own = replace(entry.options, cache_bytes=None)
            need[index] += engine_bytes(model_spec(draft), own, free)
    if sum(need) <= free or len(entries) == 1:
        return [list(entries)]
    base, *others = entries
    for other, more in zip(others, need[1:]):
        if (both := need[0] + more) > free:
            raise OptionError(
                f"memory: {base.name} and {other.name} need about {bytes_text(both)} together, "
                f"and {bytes_text(free)} are free; set cache_bytes or max_context of an entry "
                "(MODEL@max_context=4096)"
            )
    return [[base, other] for other in others]


def _price(
    entries: Sequence[Entry],
    content: str,
    asked: asking.Asked,
    hidden: Retrieval | None,
    options: dict[str, Any],
    progress: Callable[[str], None],
) -> Price:
    from skimp.cli.evaluate import calibration_warning
    from skimp.cli.models import load_engine
    from skimp.meter.calibrate import engine_hardware
    from skimp.meter.price import Candidate, graph_warning, price
    from skimp.model.locate import locate_model
    from skimp.shrink.curve import read_curves

    candidates = []
    for entry in entries:
        progress(f"loading {entry.name}")
        engine = load_engine(entry.model, entry.options)
        directory = locate_model(entry.model)
        warnings = (
            calibration_warning(engine, directory, content, options["max_bytes"]),
            graph_warning(engine, entry.cases),
        )
        candidates.append(
            Candidate(
                name=entry.name,
                directory=directory,
                engine=engine,
                warnings=tuple(filter(None, warnings)),
                healing=read_curves(directory),
            )
        )
    progress("measuring the machine")
    # Other tenants of a machine come and go: the prediction is for the machine as it is now.
    hardware = [engine_hardware(c.engine, max_age_s=RECENT_S) for c in candidates]
    return price(
        candidates,
        content,
        [entry.cases for entry in entries],
        hardware,
        tasks=asked.tasks,
        generation=asked.generation,
        retrieval=hidden,
        alone=True,  # or all others have guesses, which are measured apart
        progress=progress,
        **options,
    )


def split_entry(entry: str) -> tuple[str, dict[str, Any]]:
    """``MODEL@option=value,...`` as the model and its engine options; an entry without options, or
    a directory of that very name, is a model. ValueError names a wrong option."""
    from dataclasses import fields

    from skimp.engine.options import EngineOptions

    model, at, listed = entry.rpartition("@")
    if not at or "=" not in listed or Path(entry).expanduser().is_dir():
        return entry, {}
    known = {field.name for field in fields(EngineOptions)}
    found: dict[str, Any] = {}
    for part in listed.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise ValueError(f"{name}: not an option of the engine ({', '.join(sorted(known))})")
        if not value:
            raise ValueError(f"{name}: no value in {entry!r}")
        flags: dict[str, Any] = {"true": True, "false": False}
        found[name] = int(value) if value.isdecimal() else flags.get(value, value)
    return model, found
