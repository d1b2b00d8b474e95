"""Benchmarks, each comparing ways of doing the same work, turn by turn in one process.

python -m loadtest.bench NAME [options]      NAME: stages, decode, swap, popularity; --help after it lists its options
"""

import sys
from collections.abc import Callable, Sequence

from loadtest.bench import decode, popularity, stages, swap

BENCHES: dict[str, Callable[[Sequence[str]], None]] = {
    "stages": stages.main,
    "decode": decode.main,
    "swap": swap.main,
    "popularity": popularity.main,
}


def main() -> None:
    """Run the benchmark that is named; all of them with their defaults where none is."""
    name, *words = sys.argv[1:] or [""]
    if name in ("-h", "--help") or (name and name not in BENCHES):
        raise SystemExit(__doc__)
    for bench in [BENCHES[name]] if name else BENCHES.values():
        bench(words)


if __name__ == "__main__":
    main()
