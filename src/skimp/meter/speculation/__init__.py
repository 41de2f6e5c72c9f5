"""What guesses gain on real prompts, and why: how many come true, and what each costs.

``prompts``  real prompts by category, from files or from the packaged text
``runs``     one group of prompts answered and timed
``predict``  E / (c k + v(k)), and the cost model's own idea of c and v
``result``   the record of one engine, category and temperature
``measure``  rounds that go through all engines in turn
"""

from skimp.meter.speculation.measure import measure_speculation, tokens_needed
from skimp.meter.speculation.prompts import (
    Chosen,
    Prompt,
    PromptFileError,
    choose_prompts,
    packaged_prompts,
    read_prompts,
)
from skimp.meter.speculation.result import SpeculationResult

__all__ = [
    "Chosen",
    "Prompt",
    "PromptFileError",
    "SpeculationResult",
    "choose_prompts",
    "measure_speculation",
    "packaged_prompts",
    "read_prompts",
    "tokens_needed",
]
