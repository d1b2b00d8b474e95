"""Benchmarks: both sides of a comparison in one run, interleaved, medians of several. `python -m loadtest.bench -h`."""
