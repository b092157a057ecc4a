"""Writes tiny datasets in the form in which tensorflow-datasets prepares CIFAR-10, without tensorflow."""

import io
import json

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

VERSION = "3.0.2"


def described(kind, **about):
    return {"pythonClassName": f"tensorflow_datasets.core.features.{kind}", **about}


IMAGE = {"dtype": "uint8", "shape": {"dimensions": ["32", "32", "3"]}}
FEATURES = {
    "id": described("text_feature.Text", text={}),
    "image": described("image_feature.Image", image=IMAGE),
    "label": described("class_label_feature.ClassLabel", classLabel={"numClasses": "10"}),
}


def field(number, content):
    """A length-delimited field of a protocol buffer."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value):
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def record(image, label, name):
    """A serialised tf.train.Example."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    features = {
        b"id": field(1, field(1, name)),
        b"image": field(1, field(1, png.getvalue())),
        b"label": field(3, field(1, varint(label))),
    }
    entries = (field(1, field(1, key) + field(2, value)) for key, value in features.items())
    return field(1, b"".join(entries))


def examples(count, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return images, rng.integers(0, 10, count)


def write_cifar10(folder, sizes, seed=0):
    """Writes splits of the given sizes; returns their images and labels in the order of their ids."""
    home = folder / "cifar10" / VERSION
    home.mkdir(parents=True)
    written = {}
    for split, size in sizes.items():
        images, labels = written[split] = examples(size, seed)
        path = home / f"cifar10-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for index in np.random.default_rng(seed + 1).permutation(size):
            writer.write(record(images[index], int(labels[index]), f"{split}_{index:05d}".encode()))
        writer.close()
    file = {"filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "numBytes": "1000"}
    splits = [{"name": split, **file, "shardLengths": [str(size)]} for split, size in sizes.items()]
    about = {"name": "cifar10", "version": VERSION, "fileFormat": "array_record", "splits": splits}
    (home / "dataset_info.json").write_text(json.dumps(about))
    features = described("features_dict.FeaturesDict", featuresDict={"features": FEATURES})
    (home / "features.json").write_text(json.dumps(features))
    return written
