"""Scaffolds, one file each: the operations of `agents.operations` under names that agents know from elsewhere.

A configuration names one of these, or `package.module:OBJECT`.
"""

from qcn_jax.agents.scaffolds.scaffold import Message, Scaffold
from qcn_jax.registry import Registry

__all__ = ["SCAFFOLDS", "Message", "Scaffold"]

SCAFFOLDS = Registry("scaffold", Scaffold, {
    "mini_swe_agent": "qcn_jax.agents.scaffolds.mini_swe_agent:MINI_SWE_AGENT",
    "swe_agent": "qcn_jax.agents.scaffolds.swe_agent:SWE_AGENT",
    "qwen_code": "qcn_jax.agents.scaffolds.qwen_code:QWEN_CODE",
    "nano": "qcn_jax.recipes.nano.scaffold:NANO",
})
