"""The made archives: layout, contents, labels, oddities."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments import made_imagenet
from experiments.data import strokes
from tests.experiments.test_imagenet_builder import official

OPTIONS = ["--train-images", "45", "--validation-images", "30"]
SIZES = ["--min-size", "40", "--max-size", "90"]


def members(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        return {m.name: opened.extractfile(m).read() for m in opened}


@pytest.fixture(scope="module", autouse=True)
def _small_drawings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_imagenet, "DRAWING_SIZE", 32)  # 64 takes 8 times as long
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    made_imagenet.main([str(directory), *OPTIONS, *SIZES])
    return directory


@pytest.fixture(scope="module")
def train(directory):
    tars = members((directory / "ILSVRC2012_img_train.tar").read_bytes())
    return {name: members(data) for name, data in tars.items()}


@pytest.fixture(scope="module")
def validation(directory):
    return members((directory / "ILSVRC2012_img_val.tar").read_bytes())


def test_layout(directory, train, validation):
    assert sorted(path.name for path in directory.iterdir()) == [
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
    ]
    synsets = official("labels.txt")[:20]
    assert list(train) == [f"{synset}.tar" for synset in synsets]
    for synset, images in zip(synsets, train.values(), strict=True):
        assert set(images) <= {f"{synset}_{number}.JPEG" for number in (1, 2, 3)}
    assert [len(images) for images in train.values()] == [3] * 5 + [2] * 15
    assert len(validation) == 30
    assert all(name.startswith("ILSVRC2012_val_000") for name in validation)


def close(data, drawing):
    """Whether an image shows a drawing, whatever its size."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize(drawing.shape[1::-1])
    pixels, drawing = (np.asarray(x, float).mean(-1) for x in (image, drawing))
    return np.corrcoef(pixels.ravel(), drawing.ravel())[0, 1] > 0.8


def test_training_images_are_the_drawings(train):
    config = strokes.Strokes(num_classes=20, image_size=made_imagenet.DRAWING_SIZE)
    drawings, labels = strokes.draw(config, "train", 45)
    shown = [
        images[name]
        for number in (1, 2, 3)
        for images in train.values()
        for name in images
        if name.endswith(f"_{number}.JPEG")
    ]
    assert labels.tolist() == [n % 20 for n in range(45)]
    assert all(close(s, d) for s, d in zip(shown, drawings, strict=True))
    # The comparison tells them apart.
    assert np.mean([close(s, d) for s, d in zip(shown, drawings[::-1])]) < 0.2  # noqa: B905  (of one length)


def test_validation_images_show_the_class_of_their_number(validation):
    synsets, by_number = official("labels.txt"), official("validation_labels.txt")
    config = strokes.Strokes(num_classes=20, image_size=made_imagenet.DRAWING_SIZE)
    drawings, _ = strokes.draw(config, "test", 30)
    seen = [0] * 20
    for name, data in sorted(validation.items()):
        label = synsets.index(by_number[int(name[-13:-5]) - 1])
        assert close(data, drawings[label + 20 * seen[label]])
        seen[label] += 1
    assert seen == [2] * 10 + [1] * 10


def test_sizes_vary(train):
    images = [x for images in train.values() for x in images.values()]
    sizes = np.array([Image.open(io.BytesIO(x)).size for x in images])
    assert sizes.min() >= 40
    assert sizes.max() <= 90
    assert len({tuple(size) for size in sizes}) > 20
    aspects = sizes[:, 0] / sizes[:, 1]
    assert aspects.min() < 0.9 < 1.1 < aspects.max()


def test_oddities_are_those_of_the_official_set(train, validation):
    names = list(train)
    odd = [train[names[n]][f"{names[n][:-4]}_1.JPEG"] for n in range(5)]
    opened = [Image.open(io.BytesIO(data)) for data in odd]
    assert [image.format for image in opened] == ["JPEG", "PNG", "JPEG", "JPEG", "JPEG"]
    assert [image.mode for image in opened] == ["CMYK", "RGB", "L", "RGB", "CMYK"]
    assert len(odd[3]) > 60_000
    modes = {Image.open(io.BytesIO(data)).mode for data in validation.values()}
    assert modes == {"L", "RGB"}


def test_the_same_options_make_the_same_bytes(directory, tmp_path):
    made_imagenet.main([str(tmp_path / "again"), *OPTIONS, *SIZES])
    made_imagenet.main([str(tmp_path / "other"), *OPTIONS, *SIZES, "--seed", "1"])
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()


def test_existing_archives_are_not_replaced(directory, capsys):
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(SystemExit, match=r"^error: .*img_train.tar exists"):
        made_imagenet.main([str(directory)])
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--num-classes 1", r"num_classes=1 must lie in \[2, 1000\]"),
        ("--num-classes 1001", r"num_classes=1001 must lie in \[2, 1000\]"),
        ("--train-images 19", r"train_images=19 must lie in \[20, inf\]"),
        ("--validation-images 1001", r"validation_images=1001 must lie in \[1, 1000\]"),
        ("--validation-images 0", r"validation_images=0 must lie in \[1, 1000\]"),
        ("--min-size 501", r"min_size=501 must lie in \[8, 500\]"),
        ("--min-size 7", r"min_size=7 must lie in \[8, 500\]"),
        ("--seed -1", r"seed=-1 must lie in \[0, inf\]"),
    ],
)
def test_options_that_are_refused(tmp_path, option, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        made_imagenet.main([str(tmp_path / "none"), *option.split()])
    assert not (tmp_path / "none").exists()
