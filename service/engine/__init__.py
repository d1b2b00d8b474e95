"""The device thread and the stages it runs."""

from service.engine.engine import Engine

__all__ = ["Engine"]
