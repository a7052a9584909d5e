"""A recipe as somebody else would write it: a scaffold, an expert, trajectories and an objective; no file of qcn_jax names it."""
