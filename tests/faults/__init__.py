"""The faults that `mutants.py` puts into the package, each with the test that must notice."""

from faults.checkpoints import CHECKPOINTS
from faults.layers import LAYERS
from faults.models import MODELS
from faults.mutant import Mutant
from faults.numerics import NUMERICS
from faults.optimizers import OPTIMIZERS

__all__ = ["MUTANTS", "Mutant"]

MUTANTS = [*NUMERICS, *LAYERS, *CHECKPOINTS, *MODELS, *OPTIMIZERS]
