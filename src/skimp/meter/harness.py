"""skimp as a model of EleutherAI's lm-eval.

lm-eval finds models of others only once they are imported, so its command line is run through here:

    python -m skimp.meter.harness --model skimp --model_args pretrained=tales --tasks TASK

In Python, import ``SkimpLM`` and give ``lm_eval.simple_evaluate`` an instance or its name, "skimp".
Needs the ``eval`` extra.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

try:
    # lm-eval registers its own models only where none is registered yet: they come first.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    MISSING = f"lm-eval cannot be imported ({error}); pip install 'skimp[eval]'"
    if __name__ == "__main__":
        raise SystemExit(f"error: {MISSING}") from None
    raise ImportError(MISSING) from error

from skimp.decoding.params import SamplingParams
from skimp.engine import Engine, EngineOptions
from skimp.errors import OptionError, RequestError, SkimpWarning
from skimp.meter.continuations import encode_continuation, score_continuations
from skimp.meter.quality import first_token, score_windows
from skimp.text.chat import template_for
from skimp.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256
_CHUNK = 256  # requests between two updates of the progress bar
_SENTINEL = "\u2063\u2062\u2063"  # invisible separators, to find where a message's text ends


class SkimpLM(LM):
    """Scores and generates through an :class:`Engine`.

    ``pretrained`` is what ``skimp`` takes as MODEL; further ``model_args`` are fields of
    ``EngineOptions``. ``batch_size`` is its ``max_batch`` ("auto": the engine's own). A text longer
    than the context loses its beginning; ``loglikelihood_rolling`` scores it in windows that
    overlap by half, as ``skimp eval`` does.
    """

    def __init__(
        self,
        pretrained: str | Engine,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, Engine):
            # lm-eval passes device and batch sizes of its own accord; options are the caller's.
            for name, value in options.items():
                raise OptionError(f"{name}: the engine is already made, so {value!r} is late")
            self.engine = pretrained
        else:
            size = max_batch_size if batch_size in (None, "auto") else batch_size
            self.engine = _load(pretrained, size, device, options)
        if self.engine.tokenizer is None:
            raise OptionError("pretrained: the model has no tokenizer, and lm-eval speaks text")
        self.tokenizer: Tokenizer = self.engine.tokenizer
        self.max_gen_toks = max_gen_toks
        self._templated = False

    # ---- what lm-eval asks for ----------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        encoded = [
            encode_continuation(self.engine, context, text, templated=self._templated)
            for context, text in pairs
        ]
        with _bar("loglikelihood", disable_tqdm) as progress:
            scores = score_continuations(self.engine, encoded, progress)
        found = [(float(s.logprobs.sum()), bool(s.greedy.all())) for s in scores]
        for pair, answer in zip(pairs, found):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        prefix, context = first_token(self.engine), self.engine.max_context - 1
        found = []
        with _bar("loglikelihood_rolling", disable_tqdm) as progress:
            for done, request in enumerate(requests):
                progress(done, len(requests))
                ids = self.tokenizer.encode(request.args[0], add_special=False)
                found.append(float(score_windows(self.engine.score, prefix, ids, context).sum()))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        wanted = [
            (self._prompt(context, params.max_tokens), params)
            for context, params in ((r.args[0], self._params(r.args[1])) for r in requests)
        ]
        found: list[str] = []
        with _bar("generate_until", disable_tqdm) as progress:
            for begin in range(0, len(wanted), _CHUNK):
                progress(begin, len(wanted))
                prompts, params = zip(*wanted[begin : begin + _CHUNK])
                for out in self.engine.generate(prompts, params):
                    if out.error is not None:
                        raise RequestError(f"generate_until: {out.error}")
                    found.append(out.outputs[0].text)
        for request, text in zip(requests, found):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the model's template writes it. Without a generation prompt the last
        message stays open, to be gone on with."""
        self._templated = True
        template = template_for(self.tokenizer)
        if add_generation_prompt:
            return template.render(chat_history)
        *before, last = chat_history
        marked = {**last, "content": last["content"] + _SENTINEL}
        text = template.render([*before, marked], add_generation_prompt=False)
        opened, mark, _ = text.rpartition(_SENTINEL)
        if not mark:
            raise RequestError("messages: the chat template leaves the last one out")
        return opened

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if chat_template is False:
            return ""
        return template_for(self.tokenizer, None if chat_template is True else chat_template).source

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name.replace("/", "__")

    # ---- requests -----------------------------------------------------------------------------

    def _prompt(self, context: str, max_tokens: int | None) -> list[int]:
        """The context's tokens; one that is too long loses its beginning."""
        tokenizer = self.tokenizer
        frame = [] if self._templated else tokenizer.encode("")
        ids = tokenizer.encode(context, add_special=False, allow_special=self._templated)
        if not ids and not frame:
            return [first_token(self.engine)]
        room = self.engine.max_context - (max_tokens or 1) - len(frame)
        if room < 1:
            raise RequestError(
                f"max_gen_toks: {max_tokens} leaves no room for a prompt in a context of "
                f"{self.engine.max_context}"
            )
        return [*frame, *ids[-room:]]

    def _params(self, options: dict[str, Any]) -> SamplingParams:
        """lm-eval's ``generation_kwargs``; one that skimp does not have is refused."""
        given = dict(options)
        temperature = given.pop("temperature", None)
        sampled = given.pop("do_sample", temperature is not None) and temperature != 0
        until = given.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        names = ("max_new_tokens", "max_tokens", "max_gen_toks")  # the last one given counts
        lengths = [given.pop(name) for name in names if name in given]
        values: dict[str, Any] = {
            "max_tokens": int(lengths[-1]) if lengths else self.max_gen_toks,
            "temperature": float(temperature or 1.0) if sampled else 0.0,
            "seed": given.pop("seed", 0),
            # The text of a control token never shows: its id ends the answer.
            "stop_token_ids": [i for s in stops if (i := self._control(s)) is not None],
            "stop": [s for s in stops if s and self._control(s) is None],
        }
        if not sampled:
            for name in ("top_p", "top_k", "min_p"):
                given.pop(name, None)  # tasks set them beside do_sample: false, where they are moot
        return SamplingParams.from_dict({**values, **given})

    def _control(self, text: str) -> int | None:
        token = self.tokenizer.token_id(text)
        return token if token in self.tokenizer.control_ids else None


def _load(
    model: str, batch_size: int | str | None, device: str | None, options: dict[str, Any]
) -> Engine:
    if batch_size is not None:
        if not str(batch_size).isdecimal():
            raise OptionError(f"batch_size: expected a whole number or auto, got {batch_size!r}")
        options["max_batch"] = int(batch_size)
    if device is not None:
        options["device"] = _device(device)
    known = EngineOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise OptionError(f"{name}: no model argument; expected one of {', '.join(known)}")
    return Engine.load(model, EngineOptions(**options))


def _device(name: str) -> str:
    """lm-eval's command line says cuda:0 unless told otherwise: without a GPU that is the cpu."""
    if name not in ("cuda", "cuda:0"):
        return name
    import torch

    if torch.cuda.is_available():
        return "cuda"
    warnings.warn(f"device: {name} is not available; the cpu is used", SkimpWarning, stacklevel=2)
    return "cpu"


class _bar:
    """A tqdm bar that is told (done, total)."""

    def __init__(self, label: str, disable: bool) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm(desc=label, disable=disable)

    def __enter__(self) -> _bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        self._tqdm.total = total
        self._tqdm.update(done - self._tqdm.n)

    def __exit__(self, *exc: object) -> None:
        self._tqdm.close()


register_model("skimp")(SkimpLM)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
