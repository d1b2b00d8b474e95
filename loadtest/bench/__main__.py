"""Benchmarks, each comparing ways of doing the same work, turn by turn.

python -m loadtest.bench NAME [options]      --help after a name lists its options; without one all run with their defaults

NAME may be `all`: each runs with the options that follow, which all must have (--size, --device, --dtype, --repeats, --threads).
RECORD=1 in the environment also puts what is printed on top of loadtest/RESULTS.md.
"""

import os
import sys
from collections.abc import Callable, Sequence

from loadtest.bench import decode, fairness, http, kernels, launches, peers, popularity, stages, swap, words
from loadtest.bench.record import recorded

BENCHES: dict[str, Callable[[Sequence[str]], None]] = {
    "kernels": kernels.main,
    "launches": launches.main,
    "stages": stages.main,
    "words": words.main,
    "decode": decode.main,
    "swap": swap.main,
    "popularity": popularity.main,
    "fairness": fairness.main,
    "http": http.main,
    "peers": peers.main,
}
ALL = "all"


def main() -> None:
    """Run the benchmark that is named; all of them where none is, or `all`."""
    name, *options = sys.argv[1:] or [ALL]
    if name in ("-h", "--help") or name not in (ALL, *BENCHES):
        raise SystemExit(f"{__doc__}\nNAME: {', '.join((ALL, *BENCHES))}")
    for bench in BENCHES.values() if name == ALL else [BENCHES[name]]:
        if os.environ.get("RECORD"):
            recorded(bench, options)
        else:
            bench(options)


if __name__ == "__main__":
    main()
