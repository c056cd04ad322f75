"""The settings of NVIDIA's KVBM: its environment variables, and the module paths of its guides.

_variables      every variable, and what it does here
_environment    which variables of an environment cannot be honoured, and what the others do
_tiers          the tiers that the variables make
_module_paths   the modules that the guides tell vLLM to import
"""

from kvbm_vllm.kvbm._environment import check_environment, explain, makes_stack
from kvbm_vllm.kvbm._module_paths import NAMES, answer_module_paths, leads_here
from kvbm_vllm.kvbm._tiers import read_tiers
from kvbm_vllm.kvbm._variables import VARIABLES, Use, Variable

__all__ = [
    "NAMES",
    "VARIABLES",
    "Use",
    "Variable",
    "answer_module_paths",
    "check_environment",
    "explain",
    "leads_here",
    "makes_stack",
    "read_tiers",
]
