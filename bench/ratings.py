"""Ratings: a million games among a thousand players against a public library in the same process, and what intervals cover.

    python bench/ratings.py [GAMES]

choix (extra `[bench]`) is given its best: counts in a dense matrix, made within its time, since it has no faster way in; and once the list
of games, its plainest interface. Ours has arrays of games, and its time includes errors of all ratings and all ranks. Both must find the
same ratings. Writes bench/results/ratings.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by numpy's libraries when they load
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402

from preftune.ratings import design, estimates, fit, merged, paired, rate  # noqa: E402

PLAYERS, ROUNDS, SETS = 1000, 5, 2000


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = what()
    return time.perf_counter() - begin, found


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def million(games: int) -> dict[str, Any]:
    import choix

    generator = np.random.default_rng(0)
    ability = generator.normal(size=PLAYERS)
    first = generator.integers(PLAYERS, size=games)
    second = (first + 1 + generator.integers(PLAYERS - 1, size=games)) % PLAYERS
    won = (generator.random(games) < 1 / (1 + np.exp(ability[second] - ability[first]))).astype(float)
    names = tuple(f"player {i}" for i in range(PLAYERS))
    winner, loser = np.where(won > 0, first, second), np.where(won > 0, second, first)

    def fitted() -> np.ndarray:
        return fit(design(merged(paired(first, second, won, names), keep_order=False), "bradley-terry")).theta

    def whole() -> Any:
        return rate(paired(first, second, won, names), "bradley-terry")

    def dense() -> np.ndarray:
        counts = np.zeros((PLAYERS, PLAYERS))
        np.add.at(counts, (winner, loser), 1)
        return choix.ilsr_pairwise_dense(counts)

    def listed() -> np.ndarray:
        return choix.ilsr_pairwise(PLAYERS, list(zip(winner.tolist(), loser.tolist(), strict=True)))

    seconds: dict[str, list[float]] = {"fit": [], "rate": [], "choix dense": []}
    for _ in range(ROUNDS):  # in turn, so that a busy machine is busy for all
        for name, what in (("fit", fitted), ("rate", whole), ("choix dense", dense)):
            took, found = timed(what)
            seconds[name].append(took)
            if name == "fit":
                ours = found
            elif name == "choix dense":
                theirs = found - found.mean()
    slow, _ = timed(listed)
    result: dict[str, Any] = {name: spread(values) for name, values in seconds.items()} | {"choix list of games, once": slow}
    result |= {"games": games, "players": PLAYERS, "largest difference of log-abilities": float(np.abs(ours - theirs).max())}
    result["ratio, choix dense to fit"] = result["choix dense"]["median"] / result["fit"]["median"]
    result["ratio, choix list to fit"] = slow / result["fit"]["median"]
    assert result["largest difference of log-abilities"] < 1e-6
    return result


def verb(games: int) -> dict[str, float]:
    """The whole command on a CSV file: reading, fit, table, JSON."""
    from contextlib import redirect_stdout
    from io import StringIO

    from preftune.cli import main

    generator = np.random.default_rng(1)
    ability = generator.normal(size=PLAYERS)
    first = generator.integers(PLAYERS, size=games)
    second = (first + 1 + generator.integers(PLAYERS - 1, size=games)) % PLAYERS
    won = generator.random(games) < 1 / (1 + np.exp(ability[second] - ability[first]))
    with tempfile.TemporaryDirectory(prefix="preftune-ratings-") as folder:
        path = Path(folder) / "games.csv"
        with path.open("w") as out:
            out.write("model_a,model_b,winner\n")
            out.writelines(f"m{a},m{b},{'model_a' if w else 'model_b'}\n" for a, b, w in zip(first, second, won, strict=True))
        with redirect_stdout(StringIO()):
            took, code = timed(lambda: main(["rate", str(path), "--json", f"{folder}/out.json"]))
    assert code == 0
    return {"games": games, "seconds": took}


def coverage() -> dict[str, Any]:
    """What the test of 200 sets does, with SETS of them: see tests/test_ratings.py."""
    from test_ratings import coverage as simulate

    share = simulate(SETS)
    error = float(np.sqrt(0.95 * 0.05 / SETS))
    clustered = clusters()
    return {
        "sets": SETS,
        "least": float(share.min()),
        "most": float(share.max()),
        "mean": float(share.mean()),
        "monte_carlo_error": error,
        "within_three_errors": bool((np.abs(share - 0.95) <= 3 * error).all()),
        "contrasts": len(share),
        "clustered": clustered,
    }


def clusters() -> dict[str, float]:
    """150 prompts of four games, each leaning to one of two equal models: intervals that take games for independent, and not."""
    generator, hits = np.random.default_rng(9), {"fisher": 0, "sandwich by prompt": 0}
    for _ in range(SETS):
        lean = np.repeat(generator.choice([-1.5, 1.5], size=150), 4)
        won = (generator.random(600) < 1 / (1 + np.exp(-lean))).astype(float)
        zero = np.zeros(600, dtype=int)
        found = fit(design(paired(zero, zero + 1, won, ("a", "b"), cluster=np.arange(600) // 4), "bradley-terry"))
        for name in hits:
            e = estimates(found, np.array([[1.0, -1.0]]), intervals=name.split()[0])
            hits[name] += int(e.low[0] <= 0 <= e.high[0])
    return {name: many / SETS for name, many in hits.items()}


def main() -> None:
    games = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    results = {
        "date": date.today().isoformat(),
        "hardware": f"{processor}, {os.cpu_count()} cores, one thread used; load {os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    results["million"] = million(games)
    results["verb"] = verb(games)
    results["coverage"] = coverage()
    print(json.dumps(results, indent=1))
    if games >= 1_000_000:
        (ROOT / "bench" / "results" / "ratings.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
