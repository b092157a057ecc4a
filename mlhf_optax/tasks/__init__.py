"""The ready tasks: a network, a loss and data, under a name.

A task is what an optimizer is meta-trained or compared on. :data:`TASKS` holds, by name, the functions
that build them; their arguments are the variants of the task (widths, an activation, where the data
lie). :func:`get_task` calls them.
"""

from mlhf_optax.tasks.augmentation import augment_batch as augment_batch
from mlhf_optax.tasks.augmentation import augment_images as augment_images
from mlhf_optax.tasks.augmentation import network_input as network_input
from mlhf_optax.tasks.augmentation import standardize as standardize
from mlhf_optax.tasks.cifar10 import cifar10_convnet as cifar10_convnet
from mlhf_optax.tasks.cifar10 import cifar10_resnet9 as cifar10_resnet9
from mlhf_optax.tasks.cifar10 import load_cifar10 as load_cifar10
from mlhf_optax.tasks.data import Dataset as Dataset
from mlhf_optax.tasks.data import Examples as Examples
from mlhf_optax.tasks.data import epoch_indices as epoch_indices
from mlhf_optax.tasks.data import num_examples as num_examples
from mlhf_optax.tasks.data import sample_batches as sample_batches
from mlhf_optax.tasks.data import take as take
from mlhf_optax.tasks.digits import digits_convnet as digits_convnet
from mlhf_optax.tasks.digits import digits_mlp as digits_mlp
from mlhf_optax.tasks.digits import load_digits as load_digits
from mlhf_optax.tasks.mnist import load_mnist as load_mnist
from mlhf_optax.tasks.mnist import mnist_mlp as mnist_mlp
from mlhf_optax.tasks.models import ACTIVATIONS as ACTIVATIONS
from mlhf_optax.tasks.models import MLP as MLP
from mlhf_optax.tasks.models import ConvNet as ConvNet
from mlhf_optax.tasks.registry import TASKS as TASKS
from mlhf_optax.tasks.registry import get_task as get_task
from mlhf_optax.tasks.resnet import ResNet as ResNet
from mlhf_optax.tasks.resnet import batch_statistics as batch_statistics
from mlhf_optax.tasks.resnet import mini_resnet as mini_resnet
from mlhf_optax.tasks.resnet import resnet18 as resnet18
from mlhf_optax.tasks.task import FileOptions as FileOptions
from mlhf_optax.tasks.task import Task as Task
from mlhf_optax.tasks.task import check_batch_size as check_batch_size
from mlhf_optax.tasks.task import image_task as image_task
from mlhf_optax.tasks.task import no_augmentation as no_augmentation
from mlhf_optax.tasks.tiny import tiny_tasks as tiny_tasks
from mlhf_optax.tasks.tiny import tiny_validation_tasks as tiny_validation_tasks
from mlhf_optax.tasks.tiny_imagenet import load_tiny_imagenet as load_tiny_imagenet
from mlhf_optax.tasks.tiny_imagenet import pack_tiny_imagenet as pack_tiny_imagenet
from mlhf_optax.tasks.tiny_imagenet import tiny_imagenet_resnet18 as tiny_imagenet_resnet18
