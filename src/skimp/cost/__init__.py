"""The fraction: what a step reads and computes, and how long that takes at best.

``work``       ModelSpec, bits per weight and CacheSpecs → :class:`ModelWork` → :class:`StepCost`
``hardware``   machines by name, the roofline: :class:`StepCost` → :class:`StepTime`
``machine``    the machine at hand, measured
``memory``     what fits
``shortcuts``  what each shortcut would change

Everything here is a pure function of frozen values, but for ``machine``, which measures and keeps
a file. Nothing knows of the engine.
"""

from skimp.cost.hardware import (
    Hardware,
    Overheads,
    StepTime,
    TermTime,
    hardware_by_name,
    named_hardware,
    predict,
)
from skimp.cost.machine import this_machine
from skimp.cost.memory import MemoryPlan, max_batch, max_context, memory_plan
from skimp.cost.shortcuts import Assumptions, Inapplicable, Outcome, compare
from skimp.cost.work import (
    MatrixWork,
    MixerWork,
    ModelWork,
    SequenceStep,
    StepCost,
    Term,
    item_bytes,
    model_work,
    step_cost,
    uniform,
)

__all__ = [
    "Assumptions",
    "Hardware",
    "Inapplicable",
    "MatrixWork",
    "MemoryPlan",
    "MixerWork",
    "ModelWork",
    "Outcome",
    "Overheads",
    "SequenceStep",
    "StepCost",
    "StepTime",
    "Term",
    "TermTime",
    "compare",
    "hardware_by_name",
    "item_bytes",
    "max_batch",
    "max_context",
    "memory_plan",
    "model_work",
    "named_hardware",
    "predict",
    "step_cost",
    "this_machine",
    "uniform",
]
