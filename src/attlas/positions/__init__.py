"""Position codes that act on queries and keys. (Biases on the scores are in attlas.scores.)"""

from attlas.positions.rope import Rope
from attlas.positions.scaling import NTK, DynamicNTK, Each, Linear, Llama3, RopeScaling, Yarn

__all__ = ["NTK", "DynamicNTK", "Each", "Linear", "Llama3", "Rope", "RopeScaling", "Yarn"]
