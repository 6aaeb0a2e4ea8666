"""``strokes`` as a data set of ``tensorflow_datasets``, prepared without TensorFlow.

    import tensorflow_datasets as tfds
    from experiments.data import strokes_builder

    strokes_builder.prepare("20", data_dir)
    train = tfds.data_source("strokes/20", split="train", data_dir=data_dir)
    train[0]  # {"image": uint8[32, 32, 3], "label": ...}

The images are made, not downloaded, so a checksum replaces the usual comparison with a
published file: each config's stands in ``CHECKSUMS``, is computed again as the images
are made, kept with the prepared files, and compared each time they are opened.
"""

import contextlib
import dataclasses
import io
import os
import warnings
from collections.abc import Iterator
from typing import ClassVar

import absl.logging
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from experiments.data import strokes


class ChecksumWarning(UserWarning):
    """The images made here differ from those of the reported results."""


@dataclasses.dataclass(kw_only=True)
class StrokesConfig(tfds.core.BuilderConfig):
    """One variant of the data set.

    Attributes:
      drawing: parameters of the drawings.
      num_train: images in the split ``train``.
      num_test: images in the split ``test``.
    """

    drawing: strokes.Strokes = dataclasses.field(default_factory=strokes.Strokes)
    num_train: int = 10_240
    num_test: int = 2_048


CONFIGS = {
    config.name: config
    for config in [
        StrokesConfig(
            name="20",
            description="20 classes in 4 families; the set of the demo.",
        ),
        StrokesConfig(
            name="100",
            description="100 classes in 20 families, 51,200 training images.",
            drawing=strokes.Strokes(num_classes=100),
            num_train=51_200,
            num_test=10_240,
        ),
        StrokesConfig(
            name="20_noisy",
            description="As `20`, with a fifth of the training labels drawn at random.",
            drawing=strokes.Strokes(label_noise=0.2),
        ),
        StrokesConfig(
            name="20_small",
            description="As `20`, of 16 pixels; for studies of many runs.",
            drawing=strokes.Strokes(image_size=16),
        ),
        StrokesConfig(
            name="100_small",
            description="100 classes in 20 families, of 16 pixels; for studies.",
            drawing=strokes.Strokes(num_classes=100, image_size=16),
        ),
        StrokesConfig(
            name="tiny",
            description="5 classes of one family, 16 pixels; for tests.",
            drawing=strokes.Strokes(num_classes=5, image_size=16),
            num_train=256,
            num_test=100,
        ),
    ]
}

CHECKSUMS = {
    "20": 0xB471FF44,
    "100": 0xB940A5EC,
    "20_noisy": 0xE4DDAEF2,
    "20_small": 0x6BA4F8BD,
    "100_small": 0x5E4C04CC,
    "tiny": 0x166392EE,
}
"""CRC-32 of each config: over the blocks of ``train``, then over those of ``test``."""


class Strokes(tfds.core.GeneratorBasedBuilder):
    """Classes of three Bezier strokes, with jitter, texture, clutter and noise."""

    VERSION = tfds.core.Version(f"{strokes.VERSION}.0.0")
    BUILDER_CONFIGS: ClassVar = list(CONFIGS.values())

    @property
    def _config(self) -> StrokesConfig:
        config = self.builder_config
        assert isinstance(config, StrokesConfig)
        return config

    @property
    def _metadata(self) -> dict:
        metadata = self.info.metadata
        assert metadata is not None
        return metadata

    def checksum(self) -> int:
        """Returns the CRC-32 of the images and labels as made; see ``CHECKSUMS``."""
        return self._metadata["checksum"]

    def _info(self) -> tfds.core.DatasetInfo:
        """Returns the metadata that ``tensorflow_datasets`` keeps with the files."""
        drawing = self._config.drawing
        shape = (drawing.image_size, drawing.image_size, 3)
        # Raw bytes: as a PNG the same record takes 3 times as long to decode.
        pixels = tfds.features.Tensor(
            shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        label = tfds.features.ClassLabel(num_classes=drawing.num_classes)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"image": pixels, "label": label}),
            supervised_keys=("image", "label"),
            # Training shuffles globally; on disk the order of drawing is kept.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(checksum=0),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        """Returns a generator per split, in the order of the checksum."""
        del dl_manager
        config = self._config
        self._metadata["checksum"] = 0
        return {
            "train": self._generate_examples("train", config.num_train),
            "test": self._generate_examples("test", config.num_test),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        """Yields index and example of one split, and adds them to the checksum."""
        metadata = self._metadata
        drawn = strokes.draw_blocks(self._config.drawing, split, count)
        with tqdm.tqdm(
            desc=f"drawing strokes/{self._config.name} {split}",
            total=count,
            unit=" images",
            leave=False,
            disable=None,
        ) as bar:
            for start, images, labels in drawn:
                metadata["checksum"] = strokes.checksum(
                    images, labels, start=metadata["checksum"]
                )
                for index, image in enumerate(images):
                    yield start + index, {"image": image, "label": int(labels[index])}
                bar.update(len(images))


def prepare(name: str, data_dir: str | os.PathLike) -> Strokes:
    """Makes the data set if ``data_dir`` does not hold it yet, as ArrayRecord files.

    The files are written beside their final directory and renamed at the end, so an
    interrupted preparation leaves nothing that could be taken for the data set.  Warns
    (``ChecksumWarning``) if the images differ from those of the reported results.

    Args:
      name: name of a config, such as ``"20"``.
      data_dir: directory that holds data sets, one directory each; made if missing.

    Returns:
      The builder, ready for ``as_data_source``.

    Raises:
      ValueError: if there is no config of that name.
    """
    if name not in CONFIGS:
        raise ValueError(f"strokes has the configs {sorted(CONFIGS)}, not {name!r}")
    with _quiet():
        builder = _open(name, data_dir)
        if not builder.is_prepared():
            _make(builder)
            builder = _open(name, data_dir)
    made, expected = builder.checksum(), CHECKSUMS[name]
    if made != expected:
        warnings.warn(
            f"strokes/{name} in {builder.data_path} has the checksum {made:#010x}, not "
            f"{expected:#010x}: this NumPy ({np.__version__}) or processor draws other "
            "images, so accuracies cannot be compared with the reported ones digit by "
            "digit. Training is unaffected.",
            ChecksumWarning,
            stacklevel=2,
        )
    return builder


def _open(name: str, data_dir: str | os.PathLike) -> Strokes:
    return Strokes(config=name, data_dir=data_dir, file_format="array_record")


def _make(builder: Strokes) -> None:
    """Draws and writes the data set; another process may do the same meanwhile."""
    try:
        builder.download_and_prepare(file_format="array_record")
    except OSError:
        # The final rename fails if the other process was faster.
        if not builder.is_prepared():
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences messages about downloads and bars that count shards."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        absl.logging.set_verbosity(verbosity)
