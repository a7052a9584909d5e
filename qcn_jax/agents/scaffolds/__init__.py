"""Scaffolds, one file each: the operations of `agents.operations` under names that agents know from elsewhere.

A configuration names one of these, or `package.module:OBJECT`.
"""

from qcn_jax.agents.scaffolds.scaffold import Message, Scaffold
from qcn_jax.registry import Registry

__all__ = ["SCAFFOLDS", "Message", "Scaffold"]

SCAFFOLDS = Registry("scaffold", Scaffold, {
    "mini_swe_agent": "qcn_jax.agents.scaffolds.mini_swe_agent:MINI_SWE_AGENT",
    "swe_agent": "qcn_jax.agents.scaffolds.swe_agent:SWE_AGENT",
    "openhands": "qcn_jax.agents.scaffolds.openhands:OPENHANDS",
    "qwen_code": "qcn_jax.agents.scaffolds.qwen_code:QWEN_CODE",
    "claude_code": "qcn_jax.agents.scaffolds.claude_code:CLAUDE_CODE",
    "terminus_json": "qcn_jax.agents.scaffolds.terminus:TERMINUS_JSON",
    "terminus_xml": "qcn_jax.agents.scaffolds.terminus:TERMINUS_XML",
    "simulated_user": "qcn_jax.agents.scaffolds.simulated_user:SIMULATED_USER",
    "answer": "qcn_jax.agents.scaffolds.answer:ANSWER",
    "nano": "qcn_jax.recipes.nano.scaffold:NANO",
})
