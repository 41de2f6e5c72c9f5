"""Losses, gains and the report, on engines small enough to know what to expect."""

from __future__ import annotations

import dataclasses
import functools
import html
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from skimp.cost import hardware_by_name, predict, step_cost, uniform
from skimp.cost.work import arithmetic
from skimp.engine import Engine, EngineOptions
from skimp.errors import SkimpWarning
from skimp.formats.weight import WeightFormat
from skimp.meter import calibrate
from skimp.meter.divergence import Comparison, DivergenceResult, PairedDifference
from skimp.meter.price import (
    CacheUse,
    Candidate,
    Price,
    Row,
    TaskPrice,
    disk_bytes,
    gains,
    graph_warning,
    price,
)
from skimp.meter.probe import FormatRefused
from skimp.meter.quality import QualityResult
from skimp.meter.report import as_markdown, as_text, write_html
from skimp.meter.report.charts import _short
from skimp.meter.report.table import tables
from skimp.meter.score import share
from skimp.meter.speed import Case, SpeedResult, bench_together
from skimp.meter.tasks import TaskResult, paired_score
from skimp.meter.work import spec_work
from skimp.text.tokenizer import Tokenizer
from tests.tiny_models import tiny_decoder

CHROMIUM = shutil.which("chromium")


@functools.cache
def letters() -> Tokenizer:
    """A tokenizer of single bytes."""
    from tokenizers import Tokenizer as Plain
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Plain(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as name:
        plain.save(str(Path(name) / "tokenizer.json"))
        return Tokenizer.load(Path(name))


def engine(seed: int = 0, **options) -> Engine:
    threads = torch.get_num_threads()
    options = {"max_context": 400, "max_batch": 4, "backend": "plain", **options}
    found = Engine(tiny_decoder(seed=seed), letters(), EngineOptions(**options))
    torch.set_num_threads(threads)
    return found


TEXT = "It is a truth that a fox in want of a hen must be hungry. " * 12


def test_price_reads_and_times_every_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")
    candidates = [
        Candidate(name=name, directory=tmp_path, engine=found)
        for name, found in (("base", engine()), ("same", engine()), ("other", engine(seed=1)))
    ]
    desktop = hardware_by_name("desktop")
    cases = [Case(batch=2, context=8, new_tokens=2)]
    found = price(candidates, TEXT, [cases] * 3, [desktop] * 3, rounds=2, context=128)
    base, same, other = (row.as_dict() for row in (found.base, *found.rows))
    assert base["kl"] == 0 and base["disk_bytes"] == 3
    assert same["kl"] == pytest.approx(0, abs=1e-9) and same["inside_noise"]
    assert other["kl"] > 0.01
    assert other["kl_ci95"][0] <= other["kl"] <= other["kl_ci95"][1]
    assert other["loss"] == pytest.approx(other["bits_per_byte"] - base["bits_per_byte"])
    assert {row["window"] for row in (base, same, other)} == {128}
    work = candidates[0].engine.work
    assert base["cache_bytes_per_token"] == work.cache_bytes_per_token
    assert all(row["speed"][0]["predicted_gain"] == 1 for row in (base, same, other))
    with pytest.raises(ValueError, match="OUT"):
        price(candidates[:1], TEXT, [cases], [desktop])


def result(
    ms: tuple[float, ...], *, predicted: float, batch: int = 1, context: int = 128,
    limited_by: str | None = None,
) -> SpeedResult:  # fmt: skip
    middle = sorted(ms)[len(ms) // 2]
    case = Case(batch=batch, context=context, new_tokens=4, limited_by=limited_by)
    return SpeedResult(
        case=case, device="cpu", dtype="bfloat16",
        backend="native", threads=2, hardware="a test", ms_per_step=middle, spread=0.1,
        prefill_tokens_per_s=1000.0, prefill_spread=0.1, prefill_of_peak=0.5, rounds=len(ms),
        samples=4 * len(ms), contexts=(context + 2,) * batch, round_ms=ms, first_token_ms=128.0,
        cache_bytes_held=batch << 21, bytes_per_step=1e6, bandwidth_gb_s=10.0, limit_ms=0.1,
        predicted_ms=predicted, predicted_prefill_tokens_per_s=900.0, bound="memory",
    )  # fmt: skip


def test_gains_are_ratios_to_the_base_and_their_spread_is_paired() -> None:
    # The machine slows down by half in the last round: both feel it, and the ratio does not.
    base = [result((10.0, 12.0, 18.0), predicted=8.0)]
    (gain,) = gains(base, [result((5.0, 6.0, 9.0), predicted=2.0)])
    assert gain.gain == pytest.approx(2.0)
    assert gain.predicted == pytest.approx(4.0)
    assert gain.spread == pytest.approx(0.0)
    assert gain.as_dict()["tokens_per_s"] == pytest.approx(1e3 / 6)


def test_a_gain_counts_the_tokens_of_each_ones_own_batch() -> None:
    base = [result((10.0, 12.0, 18.0), predicted=8.0, batch=4, limited_by="cache_bytes")]
    more = [result((15.0, 18.0, 27.0), predicted=10.0, batch=12, limited_by="max_batch 12")]
    (gain,) = gains(base, more)
    assert gain.gain == pytest.approx(2.0)  # three times the tokens in one and a half the time
    assert gain.predicted == pytest.approx(2.4)
    assert gain.spread == pytest.approx(0.0)
    found = gain.as_dict()
    assert (found["batch"], found["asked_batch"]) == (12, "max")
    assert found["batch_limited_by"] == "max_batch 12"


def test_batches_beyond_cuda_graphs_are_warned_of() -> None:
    graphs = pytest.importorskip("skimp.engine.graphs")
    most = graphs.MOST_GRAPHED
    cases = [Case(batch=2, context=8), Case(batch=most + 1, context=8)]
    assert graph_warning(SimpleNamespace(backend_name="native"), cases) is None
    assert graph_warning(SimpleNamespace(backend_name="triton"), cases[:1]) is None
    found = graph_warning(SimpleNamespace(backend_name="triton"), cases)
    assert found is not None and f"a batch of {most + 1}" in found


def test_rounds_go_through_all_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from skimp.meter import speed

    seen: list[Engine] = []
    round_ = speed._round
    monkeypatch.setattr(
        speed, "_round", lambda e, case, rng: (seen.append(e), round_(e, case, rng))[1]
    )
    a, b = engine(), engine(seed=1)
    desktop = hardware_by_name("desktop")
    found = bench_together(
        [a, b], [[Case(batch=2, context=8, new_tokens=2)]] * 2, [desktop] * 2, rounds=2
    )
    assert seen == [a, b, b, a, a, b]
    assert [len(r) for r in found] == [1, 1]
    assert len(found[0][0].round_ms) == 2


def compared(difference: float, width: float, kl: float) -> Comparison:
    def quality(bits: float) -> QualityResult:
        return QualityResult(
            bits_per_byte=bits, ci95=(bits - 0.1, bits + 0.1), tokens=1000, bytes=4000,
            documents=2, blocks=40, bits_per_token=4.0, context=512,
        )  # fmt: skip

    return Comparison(
        base=quality(1.2),
        other=quality(1.2 + difference),
        paired=PairedDifference(
            bits_per_byte=difference, ci95=(difference - width, difference + width)
        ),
        divergence=DivergenceResult(
            kl=kl, ci95=(kl * 0.9, kl * 1.1), top1=0.9, top1_ci95=(0.8, 1.0), tokens=1000,
            blocks=40, context=512,
        ),
    )  # fmt: skip


def tasks(loss: float | None) -> tuple[TaskPrice, ...]:
    """A hundred pairs, of which ``loss`` fewer come out right than the base's 80."""
    right = [float(i < 80 - 100 * (loss or 0.0)) for i in range(100)]
    base = [float(i < 80) for i in range(100)]

    def answers(outcomes: list[float]) -> TaskResult:
        return TaskResult(
            name="pairs", kind="minimal-pair", n=100,
            scores={"accuracy": share([bool(o) for o in outcomes], 0.5)},
            outcomes={"accuracy": tuple(outcomes)},
        )  # fmt: skip

    own = answers(right)
    differences = {} if loss is None else {"accuracy": paired_score(answers(base), own, "accuracy")}
    return (TaskPrice(result=own, differences=differences),)


def make_price(contexts: tuple[int, ...] = (128,), *, largest: bool = False) -> Price:
    """Two models beside a base; ``largest``: the second batch is the most that a memory holds."""

    def row(name: str, found: Comparison | None, ms: float, weights: float) -> Row:
        def speed(ms: float, predicted: float, batch: int) -> list[SpeedResult]:
            limit = "cache_bytes" if largest else None
            return [
                *(result((ms, ms), predicted=predicted, context=c) for c in contexts),
                *(
                    result(
                        (2 * ms, 2.2 * ms), predicted=2 * predicted, batch=batch, context=c,
                        limited_by=limit,
                    )
                    for c in contexts
                ),
            ]  # fmt: skip

        own = speed(ms, ms if found is None else ms + 0.5, 12 if largest and found else 8)
        return Row(
            name=name, disk_bytes=10**8, resident_weight_bytes=weights,
            weight_bytes_per_token=weights, cache_bytes_per_token=16384,
            cache=tuple(
                CacheUse(context=c, bytes=int(ms) * c * 1000, bytes_read=int(ms) * c * 900)
                for c in contexts
            ),
            cache_budget=10**9,
            quality=compared(0.0, 0.0, 0.0).base if found is None else found.other,
            comparison=found,
            speed=gains(speed(10.0, 10.0, 8), own),
            tasks=tasks(None if found is None else 0.5 * found.paired.bits_per_byte),
        )  # fmt: skip

    return Price(
        base=row("base", None, 10.0, 1e8),
        rows=(
            row("int8 <b>", compared(0.001, 0.002, 0.0004), 6.0, 5e7),
            row("int4|g", compared(0.05, 0.01, 0.03), 4.0, 3e7),
        ),
    )


def test_a_curve_of_healing_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    plain = make_price()
    write_html(plain, tmp_path / "plain.html")
    assert "Healing" not in (tmp_path / "plain.html").read_text()
    first = dataclasses.replace(plain.rows[0], healing=(((0, 0.5), (1000, 0.25)),))
    healed = dataclasses.replace(plain, rows=(first, *plain.rows[1:]))
    write_html(healed, tmp_path / "healed.html")
    page = (tmp_path / "healed.html").read_text()
    assert page.count("<svg") == 4 and "held-out KL to the original" in page
    row = healed.as_dict()["rows"][0]
    assert row["healing"] == [
        [{"tokens": 0, "held_out_kl": 0.5}, {"tokens": 1000, "held_out_kl": 0.25}]
    ]


def test_charts_name_models_without_their_directories() -> None:
    assert _short("/a/b/int4/") == "int4" and _short("tales") == "tales"
    assert _short("a/m@speculate=draft,draft_model=/x/y") == "m@speculate=draft,draft_model=y"


def test_a_loss_whose_interval_holds_zero_is_inside_the_noise() -> None:
    lines = as_text(make_price()).splitlines()
    eight = next(line for line in lines if line.strip().startswith("int8"))
    four = next(line for line in lines if line.strip().startswith("int4"))
    assert "inside the noise" in eight
    assert " worse " in four and "noise" not in four
    assert make_price().rows[0].as_dict()["inside_noise"] is True


def test_tables_fit_a_terminal_of_a_hundred_columns() -> None:
    lines = as_text(make_price()).splitlines()
    notes = {table.note for table in tables(make_price())}
    grid = [line for line in lines if line not in notes]
    assert len(lines) - len(grid) == 4 and max(map(len, grid)) <= 100
    assert any(line.split() == ["(1.1000", "to", "1.3000)"] for line in lines)


def test_several_contexts_and_a_largest_batch_in_the_tables(tmp_path: Path) -> None:
    found = make_price((128, 1024, 4096), largest=True)
    takes, speed = tables(found)[-2:]
    assert takes.columns[-3:] == ("cache at 128", "cache at 1,024", "cache at 4,096")
    assert takes.rows[1][-3:] == ("768 kB", "6.14 MB", "24.6 MB")
    assert [row[1] for row in speed.rows[:6]] == [
        "1 x 128", "1 x 1024", "1 x 4096", "max 8 x 128", "max 8 x 1024", "max 8 x 4096",
    ]  # fmt: skip
    assert speed.rows[9][1] == "max 12 x 128" and speed.rows[9][-1] == "25.2 MB"
    assert "1 GB of cache" in speed.note and "no more because" not in speed.note
    lines = as_text(found).splitlines()
    for table in (takes, speed):
        for row in table.rows:
            assert any(all(cell in line for cell in row) for line in lines), row
    limited = dataclasses.replace(found.rows[0].speed[3].result.case, limited_by="max_batch 12")
    first = found.rows[0].speed[3]
    first = dataclasses.replace(first, result=dataclasses.replace(first.result, case=limited))
    row = dataclasses.replace(found.rows[0], speed=(first,))
    note = tables(dataclasses.replace(found, rows=(row,)))[-1].note
    assert "int8 <b> at 128: no more because of max_batch 12; " in note


def test_gains_and_cache_are_drawn_along_the_contexts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_html(make_price((128, 1024), largest=True), tmp_path / "price.html")
    page = (tmp_path / "price.html").read_text()
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == [
        "Loss against gain", "Gain by context, batch 1", "Gain by context, largest batch",
        "Cache of a sequence by context", "Bytes read for a token",
    ]  # fmt: skip
    assert page.count("<svg") == 5 and page.count("tokens of context") == 3


def test_markdown_has_whole_lines() -> None:
    text = as_markdown(make_price())
    assert "int4\\|g" in text
    assert "2 rounds" in text and "cpu, bfloat16" in text and "1,000 tokens" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1


def test_page_loads_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_html(make_price(), tmp_path / "price.html")
    page = (tmp_path / "price.html").read_text()
    assert page.count("<svg") == 3
    assert "int8 &lt;b&gt;" in page and "<b>" not in page
    # Namespaces are names and load nothing; every other address would.
    bare = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "://" not in bare
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!#)', bare)
    assert not re.search(r"<(script|link|iframe|img)\b|@import|url\((?!#)", bare)


def pixels(file: Path) -> np.ndarray:
    """An 8-bit PNG of Chromium as [height, width, channels]."""
    data = file.read_bytes()
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    channels = {2: 3, 6: 4}[kind]
    body, place = b"", 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 8] == b"IDAT":
            body += data[place + 8 : place + 8 + length]
        place += 12 + length
    lines = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, -1)
    out = np.zeros((height, width * channels), np.int64)
    above = np.zeros(width * channels, np.int64)
    for y in range(height):
        how, line = int(lines[y, 0]), lines[y, 1:].astype(np.int64)
        if how in (0, 2):
            line = (line + (above if how == 2 else 0)) % 256
        else:
            for x in range(len(line)):
                left = line[x - channels] if x >= channels else 0
                corner = above[x - channels] if x >= channels else 0
                up = above[x]
                guess = left + up - corner
                near = min((left, up, corner), key=lambda v: abs(guess - v))
                line[x] = (line[x] + {1: left, 3: (left + up) // 2, 4: near}[how]) % 256
        out[y] = above = line
    return out.reshape(height, width, channels)[..., :3]


def photograph(page: Path, shot: Path, width: int, height: int) -> np.ndarray:
    """The page in a window of that size, without a network, as [height, width, 3]."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--hide-scrollbars", f"--window-size={width},{height}",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={shot.parent / 'profile'}",
        f"--screenshot={shot}", page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return pixels(shot)


def coloured(seen: np.ndarray) -> np.ndarray:
    return seen.max(-1) - seen.min(-1) > 40


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("chart", [0, 1, 2])
def test_charts_are_drawn_in_a_browser_without_a_network(tmp_path: Path, chart: int) -> None:
    pytest.importorskip("matplotlib")
    write_html(make_price(), tmp_path / "price.html")
    page = (tmp_path / "price.html").read_text()
    # One chart alone, so that what is seen is it and nothing else.
    figure = re.findall(r"<svg.*?</svg>", page, re.DOTALL)[chart]
    style = "<style>body{margin:0;color:#000}svg{width:400px;height:auto}</style>"
    (tmp_path / "chart.html").write_text("<!doctype html>" + style + figure)
    seen = photograph(tmp_path / "chart.html", tmp_path / "chart.png", 400, 300)
    # Markers are small and bars are large; text and axes are dark.
    assert coloured(seen).mean() > (0.0005 if chart == 0 else 0.05)
    assert (seen.max(-1) < 100).mean() > 0.002


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(("width", "height"), [(1200, 2260), (420, 5200)])
def test_the_whole_page_is_readable_in_a_wide_and_a_narrow_window(
    tmp_path: Path, width: int, height: int
) -> None:
    pytest.importorskip("matplotlib")
    write_html(make_price(), tmp_path / "price.html")
    seen = photograph(tmp_path / "price.html", tmp_path / "page.png", width, height)
    assert seen.shape == (height, width, 3)
    inked = (seen.max(-1) < 140) | coloured(seen)
    assert not inked[-40:].any(), "the window is too short for the page"
    # Nothing is cut off or scrolled out of sight on the right: the margin is empty.
    assert not inked[:, -8:].any()
    assert inked[:, width // 2 : -8].any()
    # Tables are above, without colour; three charts below have bars or markers of two colours.
    rows = np.flatnonzero(coloured(seen).any(1))
    top, bottom = rows[0], rows[-1]
    assert (inked[:top].mean(1) > 0.02).sum() > 100, "hardly any text above the charts"
    charts = seen[top : bottom + 1]
    hues = charts[coloured(charts)].argmax(-1)
    assert min((hues == 0).sum(), (hues == 2).sum()) > 500
    assert np.diff(rows).max() < 260, "a chart between others is empty"


def test_every_figure_is_on_the_page_with_its_column(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_html(make_price(), tmp_path / "price.html")
    page = (tmp_path / "price.html").read_text()
    for table in tables(make_price()):
        for row in table.rows:
            for name, cell in zip(table.columns, row):
                if cell:
                    assert f'data-label="{html.escape(name)}"' in page
                    for part in re.split(r" (?=\()", cell):
                        assert html.escape(part) in page


FORMATS = [
    WeightFormat(kind="int", bits=8),
    WeightFormat(kind="int", bits=8, activations="int8"),
    WeightFormat(kind="int", bits=4, group_size=128),
    WeightFormat(kind="int", bits=4, group_size=32, symmetric=False),
    WeightFormat(kind="float", bits=8, activations="fp8"),
]


def test_arithmetic_has_a_name_a_kernel_not_a_group() -> None:
    assert [arithmetic(f) for f in FORMATS] == ["int8", "int8-a8", "int4", "int4", "fp8-afp8"]


@pytest.mark.parametrize("name", ["laptop", "desktop", "server", "h100"])
def test_fewer_bits_are_never_predicted_slower_at_batch_1(name: str) -> None:
    spec = dataclasses.replace(
        calibrate.probe_spec(layers=4, hidden=512, inner=2048, heads=8), dtype="bfloat16"
    )
    matrices = [m.name for m in spec_work(spec).matrices if not m.head]
    works = [
        spec_work(dataclasses.replace(spec, formats=dict.fromkeys(matrices, f))) for f in FORMATS
    ]
    works = sorted([spec_work(spec), *works], key=lambda w: w.resident_weight_bytes)
    times = [predict(step_cost(w, uniform(1, 128)), hardware_by_name(name)).seconds for w in works]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_a_step_prices_each_format_apart() -> None:
    spec = calibrate.probe_spec(layers=2)
    mixed = dataclasses.replace(spec, formats={"layers.0.ffn.up_proj": FORMATS[2]})
    work = spec_work(mixed, "float32")
    terms = {t.name: t for t in step_cost(work, uniform(1, 9)).terms}
    assert terms["feed-forward, int4"].arithmetic == "int4"
    assert terms["feed-forward, float32"].arithmetic is None
    assert terms["feed-forward, int4"].weight_bytes == 64 * 64 * FORMATS[2].bits_per_weight(64) / 8
    desktop = hardware_by_name("desktop")
    slow = dataclasses.replace(
        desktop, matrix_tflops={**desktop.matrix_tflops, "int4": ((1.0, 1e-9),)}
    )
    cost = step_cost(work, uniform(1, 9))
    more = predict(cost, slow).seconds - predict(cost, desktop).seconds
    assert more == pytest.approx(2 * 64 * 64 / 1e3, rel=0.01)


def test_a_format_is_measured_when_it_is_first_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    desktop = hardware_by_name("desktop")
    monkeypatch.setattr(calibrate, "this_machine", lambda **kw: desktop)
    monkeypatch.setattr(calibrate, "measure_engine", lambda hardware, **kw: hardware)
    calls: list[str] = []

    def measured(hardware, form, dtype, options):
        calls.append(arithmetic(form))
        rates = {**hardware.matrix_tflops, arithmetic(form): ((1.0, 0.5),)}
        exposed = {**hardware.exposed, arithmetic(form): ((1.0, 0.5),)}
        return dataclasses.replace(hardware, matrix_tflops=rates, exposed=exposed)

    monkeypatch.setattr(calibrate, "measure_format", measured)

    def get(formats, **kw):
        return calibrate.calibrated(
            dtype="float32", device="cpu", backend="plain", threads=1, formats=formats, **kw
        )

    assert "int4" not in get(FORMATS, measure=False).matrix_tflops
    get([])
    assert calls == []
    get([FORMATS[2], FORMATS[3]])
    found = get([FORMATS[0], FORMATS[2]])
    assert calls == ["int4", "int8"]
    assert found.matrix_rate("float32", 1, "int4") == 0.5
    assert found.exposed["int8"] == ((1.0, 0.5),)
    assert "int4" in get([FORMATS[2]], measure=False).matrix_tflops
    assert calls == ["int4", "int8"]


def test_another_base_or_an_old_one_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machines = iter([hardware_by_name("desktop"), hardware_by_name("server")])
    calls: list[str] = []

    def base(hardware, **kw):
        calls.append("base")
        return next(machines)

    def measured(hardware, form, dtype, options):
        calls.append(hardware.name)
        return dataclasses.replace(
            hardware,
            matrix_tflops={**hardware.matrix_tflops, "int8": ((1.0, 0.5),)},
            exposed={"int8": ((1.0, 0.5),)},
        )

    monkeypatch.setattr(calibrate, "this_machine", lambda **kw: hardware_by_name("desktop"))
    monkeypatch.setattr(calibrate, "measure_engine", base)
    monkeypatch.setattr(calibrate, "measure_format", measured)

    def get(**kw):
        return calibrate.calibrated(
            dtype="float32", device="cpu", backend="plain", threads=1, formats=FORMATS[:1], **kw
        )

    assert get().name == get(max_age_s=60.0).name == "desktop"
    assert calls == ["base", "desktop"]
    assert get(max_age_s=0.0).name == "server"
    assert calls == ["base", "desktop", "base", "server"]


def test_a_refused_format_counts_as_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    desktop = hardware_by_name("desktop")
    monkeypatch.setattr(calibrate, "this_machine", lambda **kw: desktop)
    monkeypatch.setattr(calibrate, "measure_engine", lambda hardware, **kw: hardware)

    def refused(*args):
        raise FormatRefused("held as dense")

    monkeypatch.setattr(calibrate, "measure_format", refused)
    with pytest.warns(SkimpWarning, match="count as float32's: held as dense"):
        found = calibrate.calibrated(
            dtype="float32", device="cpu", backend="plain", threads=1, formats=FORMATS[2:3]
        )
    assert found == desktop


def test_other_native_kernels_are_measured_anew() -> None:
    from skimp.kernels import native

    if not native.available():
        pytest.skip("the native kernels are not built")
    assert re.fullmatch(r"\S+ [0-9a-f]{64}", calibrate._kernels("native"))


def test_disk_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(b"45")
    assert disk_bytes(tmp_path) == 5
