"""Ratings of many from comparisons of few: Bradley-Terry, Davidson, Rao-Kupper and Plackett-Luce by maximum likelihood.

`games` holds comparisons as arrays and says whether ratings exist; `designs` reads each model as a chain of choices; `fits` finds the
maximum and its uncertainty; `boards` turns that into what people read; `rows` makes comparisons of files and records. numpy, scipy, no
torch. Mathematics and traps: docs/rate.md.

    >>> import numpy as np
    >>> games = paired(np.array([0, 0, 1]), np.array([1, 1, 0]), np.ones(3), ("ann", "bob"))
    >>> board = rate(games, "bradley-terry")
    >>> [(line.name, round(line.rating, 2)) for line in board.lines]
    [('ann', 1060.21), ('bob', 939.79)]
"""

from __future__ import annotations

from .boards import ELO, ELO_MEAN, Board, Line, compare, differences, rate
from .designs import METHODS, design
from .fits import Fit, bootstrap, covariance, estimates, fit
from .games import Ballot, Games, apart, beaten, merged, pack, paired, played, unrated
from .rows import COUNTS, TABLES, of_record, of_row, table_kind

__all__ = [
    "COUNTS",
    "ELO",
    "ELO_MEAN",
    "METHODS",
    "TABLES",
    "Ballot",
    "Board",
    "Fit",
    "Games",
    "Line",
    "apart",
    "beaten",
    "bootstrap",
    "compare",
    "covariance",
    "design",
    "differences",
    "estimates",
    "fit",
    "merged",
    "of_record",
    "of_row",
    "pack",
    "paired",
    "played",
    "rate",
    "table_kind",
    "unrated",
]
