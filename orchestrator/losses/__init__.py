"""Losses: pure functions of typed views, and the reductions that make scalars of them.

`views.py` says what a loss may see, `declare.py` how it says what it reads, `reduce.py` how values become a scalar,
`objective.py` what a trainer executes; the other files hold one family of losses each.
"""
