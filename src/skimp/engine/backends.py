"""How a forward is run: through PyTorch, or as one captured program of native kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from skimp.cache import Arena, CacheLayout
from skimp.engine.options import EngineOptions
from skimp.errors import OptionError
from skimp.kernels import native
from skimp.kernels.native import structs
from skimp.kernels.ops import StepInputs
from skimp.kernels.plain import PlainOps
from skimp.model.decoder import Decoder
from skimp.model.draft_head import DraftHead
from skimp.model.moving import move_decoder
from skimp.model.spec import ModelSpec

Forward = Decoder | DraftHead
MOST_GRAPHED = 512  # rows of a step that a GPU replays


class Backend(Protocol):
    """Runs the bound decoder over the first rows of the runner's input buffers."""

    @property
    def name(self) -> Literal["native", "triton", "plain"]: ...

    @property
    def captures(self) -> int:
        """Steps so far that prepared others of their shape, which took them far longer."""
        ...

    def wait(self) -> None:
        """Until the buffers may be written again."""
        ...

    def highest(self) -> tuple[Tensor, Tensor] | None:
        """Of the last forward's logits, float32 [L] and int32 or int64 [L]: the largest and, of
        those, the lowest index; None where it was not computed on the way."""
        ...

    def features(self) -> Tensor | None:
        """What a draft head goes on from, float32 [rows or more, D] of the last forward; valid
        until the next one. None where no head is served."""
        ...

    def forward(
        self, rows: int, num_seqs: int, num_logits: int, *, wants_features: bool = True
    ) -> Tensor:
        """Logits float32 [num_logits, V]; valid until the next call. ``wants_features``: whether a
        model that a draft head goes on from leaves features, which takes some time."""
        ...


class StepBuffers:
    """The inputs of a step at fixed addresses, large enough for any step."""

    def __init__(
        self,
        layout: CacheLayout,
        arena: Arena,
        *,
        max_rows: int,
        max_seqs: int,
        max_logits: int,
        max_context: int,
        feature_size: int = 0,
        guessed_rows: int = 1,
    ) -> None:
        """``feature_size``: D of a draft head, 0 for others; ``guessed_rows``: of a sequence in a
        step that checks or makes guesses, the most."""
        device = arena.data.device
        self.guessed_rows = guessed_rows
        # A graph's step may be padded beyond what is asked for.
        if device.type == "cuda":
            max_rows, max_logits = max(max_rows, MOST_GRAPHED), max(max_logits, MOST_GRAPHED)

        def ints(*shape: int) -> np.ndarray:
            return np.zeros(shape, dtype=np.int32)

        self.token_ids, self.positions = ints(max_rows), ints(max_rows)
        # Where in ``drawn`` a row's token is to be read, or -1: it is in ``token_ids``.
        self.token_source = ints(max_rows)
        self.any_drawn = False  # whether any of a step's are
        self.drawn = torch.zeros(max_logits, dtype=torch.int32, device=device)
        self.row_seq, self.kv_end = ints(max_rows), ints(max_rows)
        self.features = torch.zeros(max_rows, feature_size, device=device) if feature_size else None
        self.seq_starts = ints(max_seqs + 1)
        self.logit_rows = ints(max_logits)
        # Pinned where a GPU copies from them.
        self.table_tensors = [
            torch.zeros(
                max_seqs,
                -(-max_context // group.page_tokens),
                dtype=torch.int32,
                pin_memory=device.type == "cuda",
            )
            for group in layout.groups
        ]
        self.tables = [table.numpy() for table in self.table_tensors]
        # Rows that were written since a backend with tables of its own last emptied this.
        self.changed_tables: set[int] = set()
        self.arena = arena.data
        self.max_rows, self.max_seqs, self.max_logits = max_rows, max_seqs, max_logits

    def fetch_drawn(self, rows: int) -> None:
        """Complete ``token_ids`` where the drawn tokens lie in the host's memory too."""
        if self.any_drawn:
            source = self.token_source[:rows]
            late = source >= 0
            self.token_ids[:rows][late] = self.drawn.numpy()[source[late]]

    def step_inputs(
        self,
        rows: int | None = None,
        num_seqs: int | None = None,
        num_logits: int | None = None,
        *,
        wants_features: bool = True,
    ) -> StepInputs:
        """Tensors that share memory with the buffers, cut to the step (None: whole buffers)."""
        rows = self.max_rows if rows is None else rows
        num_seqs = self.max_seqs if num_seqs is None else num_seqs
        num_logits = self.max_logits if num_logits is None else num_logits
        return StepInputs(
            token_ids=torch.from_numpy(self.token_ids[:rows]),
            positions=torch.from_numpy(self.positions[:rows]),
            row_seq=torch.from_numpy(self.row_seq[:rows]),
            kv_end=torch.from_numpy(self.kv_end[:rows]),
            seq_starts=torch.from_numpy(self.seq_starts[: num_seqs + 1]),
            logit_rows=torch.from_numpy(self.logit_rows[:num_logits]),
            arena=self.arena,
            block_tables=tuple(table[:num_seqs] for table in self.table_tensors),
            features=None if self.features is None else self.features[:rows],
            wants_features=wants_features,
        )


class PlainBackend:
    name: Literal["plain"] = "plain"
    captures = 0

    def wait(self) -> None:
        pass

    def highest(self) -> None:
        return None

    def features(self) -> Tensor | None:
        return self._decoder.features

    def __init__(self, decoder: Forward, buffers: StepBuffers, ops: PlainOps) -> None:
        self._decoder, self._buffers, self._ops = decoder, buffers, ops

    @torch.inference_mode()
    def forward(
        self, rows: int, num_seqs: int, num_logits: int, *, wants_features: bool = True
    ) -> Tensor:
        buffers = self._buffers
        device = buffers.arena.device
        if device.type == "cpu":
            buffers.fetch_drawn(rows)
        step = buffers.step_inputs(rows, num_seqs, num_logits, wants_features=wants_features)
        step = step.to(device)
        if device.type != "cpu":
            source = torch.from_numpy(buffers.token_source[:rows]).to(device)
            late = buffers.drawn[source.clamp(min=0)]
            step.token_ids = torch.where(source >= 0, late, step.token_ids)
        logits: Tensor = self._decoder(step, self._ops)
        return logits


@dataclass(frozen=True)
class _Captured:
    program: native.Program
    logits: Tensor
    features: Tensor | None


class NativeBackend:
    """The whole step captured once as a program of native kernels, replayed for any size."""

    name: Literal["native"] = "native"
    captures = 0

    def wait(self) -> None:
        pass

    def highest(self) -> None:
        return None

    def features(self) -> Tensor | None:
        return self._features

    def __init__(
        self,
        decoder: Forward,
        buffers: StepBuffers,
        ops: native.NativeOps,
        *,
        threads: int | None,
        deterministic: bool,
    ) -> None:
        self._buffers, self._threads, self._deterministic = buffers, threads or 0, deterministic
        self._plain = self._captured(decoder, ops, wants_features=False)
        self._fused = self._plain
        if isinstance(decoder, Decoder) and decoder.fusion is not None:
            self._fused = self._captured(decoder, ops, wants_features=True)
        self._features = self._fused.features  # of the last forward

    def _captured(
        self, decoder: Forward, ops: native.NativeOps, *, wants_features: bool
    ) -> _Captured:
        buffers = self._buffers
        with (
            torch.inference_mode(),
            ops.capture(
                max_rows=buffers.max_rows,
                max_seqs=buffers.max_seqs,
                max_logits=buffers.max_logits,
            ) as program,
        ):
            logits = decoder(buffers.step_inputs(wants_features=wants_features), ops)
        return _Captured(program, logits, decoder.features)

    def forward(
        self, rows: int, num_seqs: int, num_logits: int, *, wants_features: bool = True
    ) -> Tensor:
        self._buffers.fetch_drawn(rows)
        chosen = self._fused if wants_features else self._plain
        chosen.program.run(rows, num_seqs, num_logits, self._threads, self._deterministic)
        self._features = chosen.features
        return chosen.logits[:num_logits]


def choose_backend(
    decoder: Forward,
    spec: ModelSpec,
    layout: CacheLayout,
    buffers: StepBuffers,
    options: EngineOptions,
    max_positions: int,
) -> Backend:
    """Bind the decoder, which is what ``spec`` says, to the backend that ``options`` name, or to
    the fastest there is."""
    usable = native.available() and options.device == "cpu"
    if options.backend == "native" and not usable:
        raise OptionError("backend: native kernels were not built; reinstall with a C++ compiler")
    missing = native.lacks(spec)
    if options.backend == "native" and missing:
        raise OptionError(f"backend: the native kernels have no {missing}; use auto or plain")
    usable = usable and missing is None
    caches = [layout.layer_cache(index) for index in range(spec.num_layers)]
    if options.backend == "native" or (options.backend == "auto" and usable):
        if layout.page_tokens % structs.PANEL:
            raise OptionError(
                f"page_tokens: the native backend needs a multiple of {structs.PANEL}, "
                f"got {layout.page_tokens}"
            )
        # A step walks every page once a layer: with 4 KiB pages address translation dominates.
        native.advise_huge(buffers.arena)
        native_ops = native.NativeOps()
        decoder.bind(native_ops, caches=caches, max_positions=max_positions)
        return NativeBackend(
            decoder,
            buffers,
            native_ops,
            threads=options.threads,
            deterministic=options.deterministic,
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    move_decoder(decoder, options.device)
    if _has_triton(options, spec):
        from skimp.engine.graphs import GraphBackend
        from skimp.kernels.triton.ops import TritonOps

        ops = TritonOps(dtype=decoder.dtype, deterministic=options.deterministic)
        decoder.bind(ops, caches=caches, max_positions=max_positions)
        return GraphBackend(decoder, buffers, ops, max_context=max_positions)
    plain_ops = PlainOps(serving=True, deterministic=options.deterministic, dtype=decoder.dtype)
    decoder.bind(plain_ops, caches=caches, max_positions=max_positions)
    return PlainBackend(decoder, buffers, plain_ops)


def _has_triton(options: EngineOptions, spec: ModelSpec) -> bool:
    if options.device != "cuda" or options.backend == "plain":
        return False
    if importlib.util.find_spec("triton") is None:
        if options.backend == "triton":
            raise OptionError("backend: triton is not installed")
        return False
    from skimp.kernels.triton.ops import lacks

    missing = lacks(spec)
    if missing and options.backend == "triton":
        raise OptionError(f"backend: the Triton kernels have no {missing}; use auto or plain")
    return missing is None
