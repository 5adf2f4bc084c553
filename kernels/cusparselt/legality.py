"""Which N:M structures are 2:4 whatever they choose: no aligned window of four inputs holds more than two active ones.

    n:m keeps at most  sum of min(n, |window ∩ group|)  over the groups of m inputs that meet a window

and groups choose independently, so that some choice keeps as many. Windows and groups meet alike every lcm(4, m) inputs, and
at the end of a layer less of both is left. It follows that 1:m is 2:4 for every m >= 2: a window holds two groups of 2, and
meets at most two larger ones. 2:m is where 4 divides m, and where a layer is one group. Nothing with n >= 3 is.
"""

from __future__ import annotations

import functools
import math
from collections import Counter

from padst_compile.structures import NM

WINDOW, MOST = 4, 2


@functools.cache
def most_active(structure: NM, in_features: int) -> int:
    """The most inputs that a choice can keep in one aligned window of four: what is 2:4 keeps `MOST`, or fewer.

    Zeros behind the last input, which fill up what a kernel takes, change nothing.
    """
    period = min(in_features, math.lcm(WINDOW, structure.m))
    return max(_most_in(structure, range(start, min(start + WINDOW, in_features))) for start in range(0, period, WINDOW))


def _most_in(structure: NM, inputs: range) -> int:
    groups = Counter(index // structure.m for index in inputs)
    return sum(min(structure.n, met) for met in groups.values())
