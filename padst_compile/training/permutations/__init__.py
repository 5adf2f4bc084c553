"""The mathematics of learning permutations: functions and small classes on tensors that know nothing of models or optimizers.

A permutation `p` reads `x[..., p]`, so its matrix Π has `Π[i, p[i]] = 1` (`padst_compile.permutation`). A soft matrix M stands
for Π: it is applied as `x @ M.T`. All is deterministic, given the arguments and a generator.
"""
