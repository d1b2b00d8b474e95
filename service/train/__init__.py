"""Fine-tune one adapter on media with texts and write its package: what `adapter-bank train` runs."""

from service.train.options import TrainOptions
from service.train.run import train

__all__ = ["TrainOptions", "train"]
