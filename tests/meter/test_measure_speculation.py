"""What guesses gain: the arithmetic by hand, and a model that guesses for itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_checkpoint import write_model

from skimp.cost import hardware_by_name, predict, step_cost, uniform
from skimp.decoding.params import SamplingParams
from skimp.decoding.proposal import EMPTY, Draft
from skimp.engine import Engine, EngineOptions
from skimp.meter.cases import Case, check_case, check_fit
from skimp.meter.report import text_of
from skimp.meter.report.speculation import speculation_tables
from skimp.meter.speculation import Chosen, measure_speculation, tokens_needed
from skimp.meter.speculation.predict import (
    StepShape,
    expected_guess,
    expected_ratio,
    lengths_timed,
    predicted_gain,
    ratio_at,
    slope,
)
from skimp.meter.speculation.runs import Script, Watch, answer

DESKTOP = hardware_by_name("desktop")
POINTS = [(0, 1.0), (1, 1.1), (2, 1.3), (4, 1.5)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small")


def engine(directory: Path, **options: object) -> Engine:
    threads = torch.get_num_threads()
    chosen = {"max_batch": 4, "deterministic": True, **options}
    found = Engine.load(directory, EngineOptions(**chosen))
    torch.set_num_threads(threads)
    return found


def prompts(count: int, length: int = 12) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(97 + (i * 7 + j * j) % 26 for j in range(length)) for i in range(count))


def chosen(**categories: int) -> Chosen:
    return Chosen(
        prompts={name: prompts(count) for name, count in categories.items()},
        templated=False,
    )


def test_v_is_straight_between_what_was_measured_and_goes_on_along_its_slope() -> None:
    assert slope([(0, 1.0), (2, 1.4)]) == pytest.approx(0.2)
    assert slope([(3, 1.4)]) == 0.0
    # x: 0, 1, 2, 4, mean 1.75; y: mean 1.225; sum of products 1.125, of squares 8.75.
    assert slope(POINTS) == pytest.approx(1.125 / 8.75)
    assert ratio_at(POINTS, 1.5) == pytest.approx(1.2)
    assert ratio_at(POINTS, 3) == pytest.approx(1.4)
    assert ratio_at(POINTS, 4) == pytest.approx(1.5)
    assert ratio_at(POINTS, 6) == pytest.approx(1.5 + 2 * 1.125 / 8.75)
    assert ratio_at(POINTS, -0.5) == pytest.approx(1.0 - 0.5 * 1.125 / 8.75)
    assert ratio_at([(0, 1.0), (1, 9.0)], -1) == 0.05


def test_the_gain_of_steps_that_are_alike_is_the_formula() -> None:
    steps = [
        StepShape(sequences=1, drafted=2, tokens=3),
        StepShape(sequences=1, drafted=2, tokens=2),
    ]
    # E = 2.5; c k + v(k) = 2 x 0.2 + 1.3.
    assert predicted_gain(steps, 1, 0.2, POINTS) == pytest.approx(2.5 / 1.7)


def test_the_gain_of_steps_that_differ_is_that_of_their_sum() -> None:
    steps = [
        StepShape(sequences=1, drafted=0, tokens=1),  # 1.0
        StepShape(sequences=1, drafted=1, tokens=2),  # 0.2 + 1.1
        StepShape(sequences=1, drafted=4, tokens=3),  # 0.8 + 1.5
    ]
    assert predicted_gain(steps, 1, 0.2, POINTS) == pytest.approx(6 / 4.6)
    assert predicted_gain(steps[:1], 1, None, POINTS) == pytest.approx(1.0)


def test_a_step_that_has_lost_sequences_has_fewer_rows() -> None:
    full = StepShape(sequences=2, drafted=4, tokens=6)  # two guesses each: 2 x 0.2 + 1.3
    half = StepShape(sequences=1, drafted=2, tokens=3)  # three rows for two sequences: v(0.5)
    assert predicted_gain([full], 2, 0.2, POINTS) == pytest.approx(3 / 1.7)
    assert predicted_gain([full, half], 2, 0.2, POINTS) == pytest.approx(4.5 / (1.7 + 0.4 + 1.05))


def test_the_lengths_that_are_timed() -> None:
    assert lengths_timed(1) == (0, 1)
    assert lengths_timed(4) == (0, 1, 2, 4)
    assert lengths_timed(6) == (0, 1, 2, 4, 6)
    # Two blocks of six steps of each of five lengths, and what may be guessed beyond the last.
    assert tokens_needed(EngineOptions(speculate="lookup"), 10) == 60 + 9
    assert tokens_needed(EngineOptions(), 10) == 10
    assert tokens_needed(EngineOptions(speculate="lookup"), 100) == 100


def test_the_cost_model_says_beforehand_what_a_row_and_a_guess_cost(directory: Path) -> None:
    work = engine(directory).work
    plain = predict(step_cost(work, uniform(2, 30)), DESKTOP).seconds
    three = predict(step_cost(work, uniform(2, 32, tokens=3, logits=3)), DESKTOP).seconds
    assert expected_ratio(work, DESKTOP, 2, 30, 2) == pytest.approx(three / plain)
    assert expected_ratio(work, DESKTOP, 2, 30, 0) == 1.0
    assert expected_guess(work, work, DESKTOP, 2, 30) == 1.0


def test_scripted_guesses_have_the_lengths_they_are_told_and_laws_like_the_others() -> None:
    class Inner:
        laws: torch.Tensor | None = None

        def propose(self, asks):
            return [Draft((1,), self.laws) for _ in asks]

        def end(self, key) -> None:
            self.ended = key

        other = 7

    inner = Inner()
    script = Script(inner, (0, 1, 3), vocab_size=10)
    ask = SimpleNamespace(most=2, tokens=[4, 9])
    assert script.propose([ask, ask]) == [EMPTY, EMPTY]
    assert script.propose([ask])[0].tokens == (0,)
    inner.laws = torch.zeros(1, 10, dtype=torch.float64)
    (draft,) = script.propose([ask])  # of three as many as are asked for
    assert draft.tokens == (0, 1) and draft.laws is not None
    assert draft.laws.dtype == torch.float64 and draft.laws.argmax(-1).tolist() == [0, 1]
    assert script.spent > 0 and script.other == 7
    script.end("key")
    assert inner.ended == "key"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_guesses_for_itself_is_always_right(
    directory: Path, temperature: float
) -> None:
    own = engine(
        directory, speculate="draft", draft_model=str(directory), draft_tokens=2,
        draft_control=False, max_context=128,
    )  # fmt: skip
    found = measure_speculation(
        engine(directory), {"self": own}, chosen(a=2, b=1), DESKTOP, temperatures=[temperature],
        new_tokens=32, rounds=2, name="small",
    )  # fmt: skip
    assert [(r.category, r.prompts, r.temperature) for r in found] == [
        ("a", 2, temperature),
        ("b", 1, temperature),
    ]
    for result in found:
        # The step that reads the prompt gives 3 tokens; 29 are left: nine steps of 3, one of 2.
        assert result.by_position == (1.0, 1.0)
        assert result.tokens_per_step == pytest.approx(2.9)
        assert result.drafted == (10 * 2 * result.prompts, 9 * 2 * result.prompts)
        assert result.drafted_per_step == pytest.approx(1.9)
        assert result.same_answers == 1.0 and result.filled == 1.0
        assert [check.guesses for check in result.checks] == [0, 1, 2]
        assert all(check.ratio > 0 and check.expected > 0 for check in result.checks)
        assert result.guess is not None and result.guess > 0 and result.expected_guess == 1.0
        assert len(result.gains) == 2 and min(result.gains) <= result.gain <= max(result.gains)
        # The prediction is the formula over these ten steps.
        points = [(check.guesses, check.ratio) for check in result.checks]
        shapes = [StepShape(sequences=1, drafted=2, tokens=3)] * 9
        shapes.append(StepShape(sequences=1, drafted=1, tokens=2))
        assert result.predicted == pytest.approx(predicted_gain(shapes, 1, result.guess, points))
        assert result.draft_bytes > own.work.resident_weight_bytes
        assert result.plain == "small" and result.draft_rule == "match"
    assert not own.has_unfinished()


def test_lengths_that_vary_are_predicted_from_what_was_drafted(directory: Path) -> None:
    """The control of lengths goes its own way; scripted steps have every length nevertheless."""
    own = engine(directory, speculate="draft", draft_model=str(directory), draft_tokens=4)
    (found,) = measure_speculation(
        engine(directory), {"self": own}, chosen(a=2), DESKTOP, temperatures=[0.0], new_tokens=64,
        rounds=2,
    )  # fmt: skip
    assert found.controlled and found.same_answers == 1.0
    assert [check.guesses for check in found.checks] == [0, 1, 2, 4]
    assert set(found.by_position) <= {1.0} and found.drafted_per_step < 4
    assert found.tokens_per_step == pytest.approx(1 + found.drafted_per_step)
    assert found.predicted > 0


def test_batches_engines_and_rounds(directory: Path) -> None:
    engines = {
        name: engine(directory, speculate=name, draft_tokens=3) for name in ("lookup", "suffix")
    }
    proposers = {name: type(one.scheduler.proposer) for name, one in engines.items()}
    told: list[str] = []
    found = measure_speculation(
        engine(directory), engines, chosen(a=5), DESKTOP, temperatures=[0.0], batch=2,
        new_tokens=24, rounds=1, progress=told.append,
    )  # fmt: skip
    assert told == ["a, batch 2, temperature 0: warm-up", "a, batch 2, temperature 0: round 1 of 1"]
    assert [(r.name, r.batch, r.prompts) for r in found] == [("lookup", 2, 4), ("suffix", 2, 4)]
    for result in found:
        assert result.same_answers == 1.0 and result.draft_rule is None
        assert result.expected_guess == 0.0 and result.draft_bytes == 0
        assert 1.0 <= result.tokens_per_step <= 4.0 and 0 < result.filled <= 1.0
    for name, one in engines.items():
        assert type(one.scheduler.proposer) is proposers[name]
        assert not one.scheduler.prompts_first and not one.has_unfinished()
    table, costs = speculation_tables(found)
    assert len(table.rows) == len(costs.rows) == 2
    shown = text_of([table, costs])
    assert "lookup" in shown and "E / (c k + v(k))" in shown


def test_where_nothing_is_guessed_there_is_no_cost_of_a_guess(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        def propose(self, asks):
            return [EMPTY for _ in asks]

        def end(self, key) -> None:
            pass

    silent = engine(directory, speculate="suffix", draft_tokens=2, max_context=128)
    silent.scheduler.proposer = Silent()
    monkeypatch.setattr("skimp.meter.speculation.measure.forget", lambda one: None)
    (found,) = measure_speculation(
        engine(directory), {"silent": silent}, chosen(a=1), DESKTOP, temperatures=[1.0],
        new_tokens=24, rounds=1,
    )  # fmt: skip
    assert found.guess is None and found.by_position == () and found.tokens_per_step == 1.0
    assert found.as_dict()["cost_ratio"] is None
    assert [check.guesses for check in found.checks] == [0, 1, 2]
    assert "no guess" in text_of(speculation_tables([found]))


def test_what_does_not_fit_is_refused_before_it_is_timed(directory: Path) -> None:
    plain = engine(directory)
    lookup = engine(directory, speculate="lookup", max_context=100)

    def measure(**options):
        given = {"new_tokens": 24, "rounds": 1, **options}
        return measure_speculation(plain, {"x": lookup}, chosen(a=8), DESKTOP, **given)

    for options, named in (
        ({"new_tokens": 9}, "new_tokens: more than 9"),
        ({"rounds": 0}, "rounds: at least 1"),
        ({"new_tokens": 90}, "prompts: 12 tokens and 90 new ones do not fit the 100 positions of"),
        ({"batch": 6}, "batch: 6 sequences exceed max_batch 4"),
    ):
        with pytest.raises(ValueError, match=named):
            measure(**options)
    case = Case(batch=1, context=8)
    check_fit(lookup.cache.arena, lookup.options, case, "x")
    with pytest.raises(ValueError, match=r"speculate: lookup of x .* on real prompts instead"):
        check_case(lookup.cache.arena, lookup.options, case, "x")


def test_steps_are_those_after_all_prompts_were_read(directory: Path) -> None:
    plain = engine(directory, token_budget=16)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    run = answer(plain, prompts(3, length=40), params)
    assert [(step.sequences, step.tokens) for step in run.steps] == [(3, 3)] * 5
    assert [len(tokens) for tokens in run.answers] == [6, 6, 6]
    short = answer(plain, prompts(3), params, most_steps=2)
    assert len(short.steps) == 2 and not plain.has_unfinished()


def test_a_watch_counts_the_seconds_even_of_a_failure() -> None:
    class Broken:
        def propose(self, asks):
            raise RuntimeError("no")

    watch = Watch(Broken())
    with pytest.raises(RuntimeError):
        watch.propose([])
    assert watch.spent > 0
