"""Choosing tokens: parameters, the processing of logits, random streams, sampling, stopping.

The interface, and who may change what:

* ``SamplingParams``: frozen, checked; what a request asks.
* ``RowState``: one sample of one request. The engine makes it at admission and calls ``commit``
  with accepted tokens; ``drafted`` gives a throw-away view with assumed tokens. Its random numbers
  are a function of (key, position, purpose), so it can be rebuilt by replaying its tokens.
* ``process``: raw logits to the final law, for every row alike. ``Sampler.sample``: one token a
  row, errors per row. Neither changes a row.
* A proposer guesses tokens (``proposal``, ``lookup``, ``suffix``) and an acceptor (``accept``) says
  how many stand; neither changes a row.
* ``StopChecker``: one output's text and end; ``push`` every committed token, then ``finish``.
"""

from skimp.decoding.params import ParamsError, SamplingParams
from skimp.decoding.process import Processed, process
from skimp.decoding.rng import Purpose, uniform, uniforms
from skimp.decoding.rows import PenaltyState, RowState, resolve_bad_words
from skimp.decoding.sampler import SampledBatch, Sampler, TokenLogprobs, prompt_logprobs
from skimp.decoding.stops import FinishReason, StopChecker, StopStrings
from skimp.kernels.draws import draw

__all__ = [
    "FinishReason",
    "ParamsError",
    "PenaltyState",
    "Processed",
    "Purpose",
    "RowState",
    "SampledBatch",
    "Sampler",
    "SamplingParams",
    "StopChecker",
    "StopStrings",
    "TokenLogprobs",
    "draw",
    "process",
    "prompt_logprobs",
    "resolve_bad_words",
    "uniform",
    "uniforms",
]
