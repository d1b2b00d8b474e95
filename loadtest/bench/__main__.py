"""Benchmarks, each comparing ways of doing the same work, turn by turn.

python -m loadtest.bench NAME [options]      --help after a name lists its options; without one all run with their defaults
"""

import sys
from collections.abc import Callable, Sequence

from loadtest.bench import decode, fairness, http, kernels, peers, popularity, stages, swap

BENCHES: dict[str, Callable[[Sequence[str]], None]] = {
    "kernels": kernels.main,
    "stages": stages.main,
    "decode": decode.main,
    "swap": swap.main,
    "popularity": popularity.main,
    "fairness": fairness.main,
    "http": http.main,
    "peers": peers.main,
}


def main() -> None:
    """Run the benchmark that is named; all of them with their defaults where none is."""
    name, *words = sys.argv[1:] or [""]
    if name in ("-h", "--help") or (name and name not in BENCHES):
        raise SystemExit(f"{__doc__}\nNAME: {', '.join(BENCHES)}")
    for bench in [BENCHES[name]] if name else BENCHES.values():
        bench(words)


if __name__ == "__main__":
    main()
