"""Documents that mid-training mixes: repositories, fill-in-the-middle, and edits from a source that is named.

A source of edits is a function (context, modules, tokenizer, max_tokens) -> documents: `modules` are pairs of path and
source text, a document is `tokens` int32 [T] and `weights` float32 [T], and any index gives one, always the same.
"""

from qcn_jax.registry import Registry

EDITS: Registry = Registry("source of edit documents", None, {"nano": "qcn_jax.recipes.nano.edits:documents"})
