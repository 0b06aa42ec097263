"""The faults that `mutants.py` puts into the package, each with the test that must notice."""

from faults.checkpoints import CHECKPOINTS
from faults.cli import COMMANDS
from faults.compiled import COMPILED
from faults.distillation import DISTILLATION
from faults.files import FILES
from faults.fp8 import FP8
from faults.hostile import CONTENTS
from faults.integrations import INTEGRATIONS
from faults.layers import LAYERS
from faults.messages import ENTRANCES
from faults.models import MODELS
from faults.mutant import Mutant
from faults.numerics import NUMERICS
from faults.optimizers import OPTIMIZERS
from faults.options import OPTIONS
from faults.returning import RETURNED_RESULTS
from faults.selected import SELECTED_TOKENS
from faults.sglang import SGLANG
from faults.streaming import STREAMING
from faults.tokens import TOKENS
from faults.transfer import TRANSFER
from faults.wire import WIRE

__all__ = ["MUTANTS", "Mutant"]

MUTANTS = [
    *NUMERICS,
    *TOKENS,
    *COMPILED,
    *OPTIONS,
    *RETURNED_RESULTS,
    *SELECTED_TOKENS,
    *INTEGRATIONS,
    *LAYERS,
    *OPTIMIZERS,
    *CHECKPOINTS,
    *FILES,
    *CONTENTS,
    *DISTILLATION,
    *FP8,
    *ENTRANCES,
    *COMMANDS,
    *MODELS,
    *STREAMING,
    *SGLANG,
    *TRANSFER,
    *WIRE,
]
