"""Load against a running server, and benchmarks beside it. Nothing here is part of the service."""
