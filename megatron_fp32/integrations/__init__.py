"""Functions that RL frameworks call for token log-probs and entropy, with these frameworks' names and arguments.

Each module is named after its framework, and each function after the one that it takes the place of. A user changes one
import. No framework is imported here.
"""
