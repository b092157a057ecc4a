"""How the comparison on ResNet-18 is made shorter, on three blobs in the place of images."""

import numpy as np
import pytest
import transfer_resnet18 as script
from blobs import TASK

pytestmark = pytest.mark.usefixtures("unoptimised")


def test_a_shortened_task_has_the_first_examples_and_all_others_parts():
    shorter = script.shortened(TASK, 12)
    np.testing.assert_array_equal(shorter.data.train["image"], TASK.data.train["image"][:12])
    for part in ("meta_train", "test"):
        np.testing.assert_array_equal(getattr(shorter.data, part)["label"], getattr(TASK.data, part)["label"])


@pytest.mark.parametrize("count", [0, TASK.batch_size - 1, 31])
def test_too_few_and_too_many_examples_are_refused(count):
    with pytest.raises(ValueError, match=f"from the batch size, 8, to 30, the number of images, got {count}"):
        script.shortened(TASK, count)
