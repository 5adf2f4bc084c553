"""Which channel orders a graph leaves free: tensor axes, how operators tie them, and the groups of orders that remain."""
