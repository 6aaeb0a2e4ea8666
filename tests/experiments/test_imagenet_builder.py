"""The preparation of ImageNet beside `tensorflow_datasets`' own, on small images."""

import io
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import example_serializer, writer
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

from experiments.data import (
    encodings,
    imagenet_archives,
    imagenet_builder,
    imagenet_check,
    splits,
)

# The PNG and a CMYK image have the names of official ones: tensorflow_datasets knows
# them by name.
ODD = {"n02105855_2933.JPEG": "PNG", "n01739381_1309.JPEG": "CMYK"}
SYNSETS = ["n01440764", "n01739381", "n02105855", "n15075141"]


def image_file(rng, kind="RGB"):
    width, height = rng.integers(12, 40, 2)
    pixels = rng.integers(0, 256, (3, 3, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if kind == "PNG":
        image.save(file, "PNG")
    else:
        image.convert(kind).save(file, "JPEG")
    return file.getvalue()


def tar(contents):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return file.getvalue()


def train_files():
    rng = np.random.default_rng(0)
    files = {}
    for synset in SYNSETS:
        names = [f"{synset}_{number}.JPEG" for number in range(1, 11)]
        names += [name for name in ODD if name.startswith(synset)]
        files[synset] = {n: image_file(rng, ODD.get(n, "RGB")) for n in names}
    return files


def validation_files(numbers):
    rng = np.random.default_rng(1)
    return {
        f"ILSVRC2012_val_{number:08}.JPEG": image_file(rng, "L" if i == 3 else "RGB")
        for i, number in enumerate(numbers)
    }


def write_archives(directory, train, validation):
    tars = {f"{synset}.tar": tar(files) for synset, files in train.items()}
    paths = {s: directory / name for s, name in imagenet_archives.TARS.items()}
    paths["train"].write_bytes(tar(tars))
    paths["validation"].write_bytes(tar(validation))
    return paths


def indexed(path, split):
    parts = imagenet_archives.parts(path, split)
    return np.concatenate([imagenet_archives.index(path, p, split) for p in parts])


def prepared(archives, data_dir):
    builder = imagenet_builder.open_builder(data_dir)
    directory = pathlib.Path(builder.data_path).with_name("work")
    directory.mkdir(parents=True)
    shards = {}
    for split, path in archives.items():
        shards[split] = imagenet_builder.plan(indexed(path, split), split, directory)
        for shard in reversed(shards[split]):
            imagenet_builder.write_shard(shard, path, builder.info.features)
    imagenet_builder.finish(builder, shards, directory)
    return pathlib.Path(builder.data_path)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    # In the archive the order is not that of the names.
    train = dict(reversed(train_files().items()))
    validation = dict(reversed(validation_files(range(1, 13)).items()))
    return write_archives(tmp_path_factory.mktemp("archives"), train, validation)


def official(name):
    return (tfds.core.tfds_path("datasets/imagenet2012") / name).read_text().split()


class Reference(imagenet2012_dataset_builder.Builder, skip_registration=True):
    """The official builder; only what calls TensorFlow is replaced."""

    name = "imagenet2012"

    @classmethod
    def _get_pkg_dir_path(cls):
        return imagenet2012_dataset_builder.Builder._get_pkg_dir_path()

    def _split_generators(self, dl_manager):
        train, validation = (
            tarfile.open(dl_manager.manual_dir / name)  # noqa: SIM115  (as the builder does)
            for name in imagenet_archives.TARS.values()
        )
        lines = official("validation_labels.txt")
        names = dict(zip(sorted(validation.getnames()), lines, strict=False))
        return {
            "train": self._generate_examples(_iterated(train)),
            "validation": self._generate_examples(_iterated(validation), names),
        }

    def _fix_image(self, image_fname, image):
        kind = {"PNG": "png", "CMYK": "cmyk"}.get(ODD.get(image_fname, ""), "jpeg")
        return io.BytesIO(encodings.to_rgb_jpeg(image.read(), kind))


def _iterated(opened):
    with opened:
        for member in opened:
            yield member.name, opened.extractfile(member)


def reference(archives, data_dir, builder_class=Reference):
    builder = builder_class(data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=archives["train"].parent)
    builder.download_and_prepare(file_format="array_record", download_config=config)
    return pathlib.Path(builder.data_path)


def fix_the_order_of_fields(monkeypatch):
    """Takes the chance out of how tensorflow_datasets writes a record."""
    monkeypatch.setattr(
        example_serializer.ExampleSerializer,
        "serialize_example",
        lambda self, example: self.get_tf_example(example).SerializeToString(
            deterministic=True
        ),
    )


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("min_shard_size", [shard_utils.DEFAULT_MIN_SHARD_SIZE, 2500])
def test_files_are_those_of_tensorflow_datasets(
    archives, tmp_path, monkeypatch, min_shard_size
):
    monkeypatch.setattr(shard_utils.ShardConfig, "min_shard_size", min_shard_size)
    fix_the_order_of_fields(monkeypatch)
    ours = contents(prepared(archives, tmp_path / "ours"))
    theirs = contents(reference(archives, tmp_path / "theirs"))
    module = imagenet2012_dataset_builder.__name__.encode()
    info = theirs["dataset_info.json"]  # names the module of the builder
    theirs["dataset_info.json"] = info.replace(__name__.encode(), module)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    num_shards = {
        len([n for n in ours if f"-{s}." in n]) for s in ("train", "validation")
    }
    assert num_shards == ({1} if min_shard_size > 2500 else {2, 8})


@pytest.mark.slow  # TensorFlow is no part of the ordinary installation
def test_files_are_those_of_the_official_builder(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    fix_the_order_of_fields(monkeypatch)
    # Without CMYK, which TensorFlow decodes by a fast, less exact transform.
    train = train_files()
    del train["n01739381"]["n01739381_1309.JPEG"]
    archives = write_archives(tmp_path, train, validation_files(range(1, 13)))
    ours = contents(prepared(archives, tmp_path / "ours"))
    builder = imagenet2012_dataset_builder.Builder
    theirs = contents(reference(archives, tmp_path / "theirs", builder))
    assert ours == theirs


@pytest.fixture(scope="module")
def data_dir(archives, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    prepared(archives, data_dir)
    return data_dir


def test_records_are_read_as_any_data_set_is(data_dir):
    builder = tfds.builder(
        "imagenet2012", data_dir=data_dir, file_format="array_record"
    )
    assert builder.is_prepared()
    source = tfds.data_source("imagenet2012", data_dir=data_dir, split="train")
    files = {n: data for files in train_files().values() for n, data in files.items()}
    assert len(source) == len(files) == 42
    int2str = builder.info.features["label"].int2str
    for record in source:
        name = record["file_name"].decode()
        assert int2str(record["label"]) == name.partition("_")[0]
        pixels = np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"), float)
        # Pillow and OpenCV differ; the odd ones were encoded once more.
        limit = 5 if name in ODD else 2
        assert np.abs(record["image"] - pixels).mean() < limit, name

    train = splits.open_split("imagenet2012", "train", data_dir)
    validation = splits.open_split("imagenet2012", "validation", data_dir)
    assert (len(train), len(validation)) == (42, 12)
    assert not train.fixed_size
    assert train.num_classes == 1000


def test_validation_labels_go_by_the_number(tmp_path):
    # A part of the official images, which positions in a sorted list would get wrong.
    numbers = [7, 1, 50_000, 23_456]
    archives = write_archives(tmp_path, train_files(), validation_files(numbers))
    rows = indexed(archives["validation"], "validation")
    labels, names = official("validation_labels.txt"), official("labels.txt")
    assert [names[label] for label in rows["label"]] == [labels[n - 1] for n in numbers]


@pytest.mark.parametrize("name", ["n01440764_1.JPEG", "ILSVRC2012_val_00000001.JPEG"])
def test_sizes_are_known_before_anything_is_written(name):
    features = imagenet_builder.open_builder(pathlib.Path("nowhere")).info.features
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    # Around the sizes at which a length takes one byte more, at any level of nesting.
    sizes = [0, *range(60, 130), *range(16_310, 16_390), 2_097_100, 2_097_152]
    for size, label in [(s, (0, 127, 128, 999)[s % 4]) for s in sizes]:
        rows = np.array([(name, label, 0, 0, 0, size)], imagenet_archives.IMAGE)
        example = {"image": bytes(size), "label": label, "file_name": name}
        record = serializer.serialize_example(features.encode_example(example))
        assert imagenet_builder.num_bytes(rows) == len(record)


def test_the_official_set_has_1024_and_64_shards():
    rows = np.zeros(1_000, imagenet_archives.IMAGE)
    rows["name"] = [f"ILSVRC2012_val_{n:08}.JPEG" for n in range(len(rows))]
    rows["written_size"] = 6_700_000  # as many bytes as the archive has
    assert len(imagenet_builder.plan(rows, "validation", pathlib.Path())) == 64
    config = shard_utils.ShardConfig()
    assert config.get_number_shards(147_000_000_000, 1_281_167) == 1024


def test_a_name_that_occurs_twice(archives):
    rows = indexed(archives["train"], "train")
    with pytest.raises(imagenet_archives.ArchiveError, match=r"n\w+.JPEG' .* twice"):
        imagenet_builder.plan(np.append(rows, rows[:1]), "train", pathlib.Path())


def some_shard(archives, directory):
    rows = indexed(archives["train"], "train")
    (shard,) = imagenet_builder.plan(rows, "train", directory)
    features = imagenet_builder.open_builder(directory).info.features
    return shard, archives["train"], features


def test_a_full_disk_leaves_no_shard(archives, tmp_path, monkeypatch):
    write = writer.ExampleWriter.write
    monkeypatch.setattr(
        writer.ExampleWriter,
        "write",
        lambda self, path, examples: write(self, "/dev/full", examples),
    )
    with pytest.raises(imagenet_builder.ShardError, match="No space left on device"):
        imagenet_builder.write_shard(*some_shard(archives, tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_archive_that_changed_leaves_no_shard(archives, tmp_path):
    shard, archive, features = some_shard(archives, tmp_path)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[:20_000])
    with pytest.raises(imagenet_archives.ArchiveError, match="ends before image 'n"):
        imagenet_builder.write_shard(shard, cut, features)
    shard.images["written_size"] += 1
    with pytest.raises(imagenet_archives.ArchiveError, match="no longer the archive"):
        imagenet_builder.write_shard(shard, archive, features)
    assert list(tmp_path.iterdir()) == [cut]


def test_a_damaged_shard_is_not_given_its_name(archives, tmp_path):
    builder = imagenet_builder.open_builder(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    shard, *rest = some_shard(archives, work)
    imagenet_builder.write_shard(shard, *rest)
    for damage in (b"", shard.path.read_bytes()[:9000]):
        shard.path.write_bytes(damage)
        with pytest.raises(imagenet_builder.ShardError, match=r"of its 42 images"):
            imagenet_builder.finish(builder, {"train": [shard]}, work)
    assert not builder.is_prepared()


# -- archives -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "not a whole, uncompressed tar"),
        (lambda data: data[:700], "not a whole, uncompressed tar"),
        (lambda data: data[: data.rindex(b"n15075141.tar")], "no header and no end"),
        (lambda data: b"", "not a whole, uncompressed tar"),
        (lambda data: b"<html>" * 500, "not a whole, uncompressed tar"),
        (lambda data: tar({"n01440764.zip": b""}), "'n01440764.zip', which is not"),
        (lambda data: tar({"n00000000.tar": b""}), "'n00000000.tar', which is not"),
    ],
    ids=["half", "a header", "no end", "empty", "a page", "no tar", "no class"],
)
def test_training_archives_that_are_refused(tmp_path, damage, message):
    archives = write_archives(tmp_path, train_files(), {})
    path = archives["train"]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(imagenet_archives.ArchiveError, match=message):
        imagenet_archives.parts(path, "train")


PNG_CUT_SHORT = image_file(np.random.default_rng(2), "PNG")[:400]


@pytest.mark.parametrize(
    ("split", "name", "data", "message"),
    [
        ("train", "n01440764_1.JPG", b"", "'n01440764_1.JPG', which is not an image"),
        ("train", "n01739381_1.JPEG", b"", "'n01739381_1.JPEG', which is not an image"),
        ("train", "n01440764_1.JPEG", PNG_CUT_SHORT, "1.JPEG in .* cannot be decoded"),
        ("validation", "ILSVRC2012_val_00000000.JPEG", b"", "which is not an image"),
        ("validation", "ILSVRC2012_val_00050001.JPEG", b"", "which is not an image"),
    ],
    ids=["name", "class", "png", "number 0", "number 50,001"],
)
def test_images_that_are_refused(tmp_path, split, name, data, message):
    paths = write_archives(tmp_path, {"n01440764": {name: data}}, {name: data})
    with pytest.raises(imagenet_archives.ArchiveError, match=message):
        indexed(paths[split], split)


def test_a_class_cut_short_inside_the_archive(tmp_path):
    path = write_archives(tmp_path, train_files(), {})["train"]
    inner = tar(train_files()["n01440764"])
    for length in (len(inner) // 3, inner.index(b"n01440764_5")):
        path.write_bytes(tar({"n01440764.tar": inner[:length]}))
        (part,) = imagenet_archives.parts(path, "train")
        with pytest.raises(imagenet_archives.ArchiveError, match=r"n01440764\.tar in "):
            imagenet_archives.index(path, part, "train")


def test_the_fingerprint_sees_both_ends(tmp_path):
    path = tmp_path / "archive"
    data = bytearray(3 << 20)
    path.write_bytes(data)
    prints = {str(imagenet_archives.fingerprint(path))}
    for position in (0, -1):
        data[position] = 1
        path.write_bytes(data)
        prints.add(str(imagenet_archives.fingerprint(path)))
    path.write_bytes(data + b"\0")
    prints.add(str(imagenet_archives.fingerprint(path)))
    assert len(prints) == 4


# -- decoding everything --------------------------------------------------------------


def test_images_that_cannot_be_decoded_are_named(tmp_path):
    train = train_files()
    whole = train["n01440764"]["n01440764_3.JPEG"]
    train["n01440764"]["n01440764_3.JPEG"] = whole[:300]
    train["n15075141"]["n15075141_9.JPEG"] = b""
    archives = write_archives(tmp_path, train, validation_files([1]))
    prepared(archives, tmp_path)
    found = imagenet_check.undecodable(tmp_path, "train", 0, 42)
    assert {image.name: image.reason for image in found} == {
        "n01440764_3.JPEG": "300 bytes that cannot be decoded",
        "n15075141_9.JPEG": "0 bytes that cannot be decoded",
    }
    first, second = found
    assert imagenet_check.undecodable(tmp_path, "train", 0, first.index) == []
    part = imagenet_check.undecodable(tmp_path, "train", first.index + 1, 42)
    assert part == [second]


def test_records_that_cannot_be_read_are_named(archives, tmp_path):
    directory = prepared(archives, tmp_path)
    (path,) = directory.glob("*train*")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 50] = bytes(50)
    path.write_bytes(data)
    found = imagenet_check.undecodable(tmp_path, "train", 0, 42)
    assert found
    assert all(0 <= image.index < 42 for image in found)
