"""CUDA-convnet on CIFAR-10, as several scripts train it; narrow networks are the cheap road."""

import dataclasses
from typing import Any

from mlhf_optax.comparison.experiment import ExperimentOptions, limit_data
from mlhf_optax.tasks import Task, cifar10_convnet


@dataclasses.dataclass(frozen=True)
class ConvnetOptions(ExperimentOptions):
    """Options of a comparison on CUDA-convnet."""

    channels: tuple[int, ...] = (32, 64)
    """Channels of the convolutions; 8 16 is narrow."""
    hidden: tuple[int, ...] = (32,)
    """Widths of the dense layers."""

    def make_task(self, sizes: tuple[int, int, int], **more: Any) -> Task:
        """Returns the task; a quick one is narrow and has parts of ``sizes``."""
        options = self.shortened(channels=(8, 16), hidden=(16,))
        task = cifar10_convnet(
            channels=options.channels,
            hidden=options.hidden,
            batch_size=options.batch_size,
            data_dir=options.data_dir,
            cache_dir=options.cache_dir,
            **more,
        )
        return limit_data(task, *sizes) if self.quick else task
