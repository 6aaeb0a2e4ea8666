"""Settings that contradict each other are refused, with the value and a way out."""

import dataclasses
import re

import pytest

from experiments import imagenet_resnet50
from experiments.settings import Config, Kfac, Lars, Nlcg, SpNgd

SP_NGD = {"optimizer": "sp_ngd", "epochs": 35.0}
POSITIVE = ["batch_size", "micro_batch_size", "eval_batch_size", "epochs", "log_period"]
POSITIVE += ["eval_epochs", "checkpoint_epochs", "keep_checkpoints", "num_threads"]
POSITIVE += ["start_timeout", "heartbeat_timeout", "doubly_factored"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"schedule": "staircase"},
            "decay_epochs=() must name the epochs of schedule=staircase",
        ),
        (
            {"decay_epochs": (30.0, 60.0)},
            "decay_epochs=(30.0, 60.0) needs schedule=staircase, got schedule=cosine; "
            "pass either that or decay_epochs=()",
        ),
        (
            {"schedule": "staircase", "decay_epochs": (60.0, 30.0)},
            "decay_epochs=(60.0, 30.0) must be positive and ascend",
        ),
        (
            {"schedule": "staircase", "decay_epochs": (0.0, 30.0)},
            "decay_epochs=(0.0, 30.0) must be positive and ascend",
        ),
        (
            {"decay_rate": 0.9, "schedule": "polynomial"},
            "decay_rate=0.9 needs schedule=exponential, got schedule=polynomial",
        ),
        (
            {"decay_from": "warmup"},
            "decay_from=warmup needs schedule=polynomial, got schedule=cosine; pass "
            "either that or decay_from=start",
        ),
        (
            {"end_value": 1e-4, "schedule": "exponential"},
            "end_value=0.0001 needs schedule=polynomial, got schedule=exponential",
        ),
        (
            {"end_value": 0.03, "schedule": "polynomial"},
            "end_value=0.03 must lie in [0, kfac.learning_rate=0.03)",
        ),
        (
            {"end_value": -1.0, "schedule": "polynomial"},
            "end_value=-1.0 must lie in [0, kfac.learning_rate=0.03)",
        ),
        (
            {"kfac": Kfac(kl_clip=None, kl_clip_decay=0.9)},
            "kfac.kl_clip_decay=0.9 needs a bound that decays, got kfac.kl_clip=None",
        ),
        (
            {**SP_NGD, "sp_ngd": SpNgd(decay_end=34.0)},
            "sp_ngd.decay_end=34.0 must be at least epochs=35.0, as the learning",
        ),
        (
            {**SP_NGD, "sp_ngd": SpNgd(decay_start=35.0)},
            "sp_ngd.decay_start=35.0 must lie in [0, epochs=35.0)",
        ),
        (
            {**SP_NGD, "sp_ngd": SpNgd(decay_start=-1.0)},
            "sp_ngd.decay_start=-1.0 must lie in [0, epochs=35.0)",
        ),
        (
            {**SP_NGD, "fisher": "sampled"},
            "fisher=sampled is not read by optimizer=sp_ngd, whose sp_ngd.fisher is "
            "empirical; pass sp_ngd.fisher=sampled, or fisher=empirical",
        ),
        (
            {"optimizer": "sgd", "doubly_factored": 512},
            "doubly_factored=512 needs an optimizer with curvature, got optimizer=sgd",
        ),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**settings)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("decay_rate", (0.0, 1.5), "(0, 1]"),
        ("statistics_fraction", (0.0, 1.5), "(0, 1]"),
        ("random_erasing", (-0.1, 1.5), "(0, 1]"),
        ("weight_average", (1.0,), "[0, 1)"),
        ("weight_average", (0.0,), "(0, 1]"),
        ("mixup_alpha", (-1.0, float("inf")), "0 or positive"),
        ("seed", (-1, 2**32), "[0, 4294967296)"),
        ("warmup_epochs", (-0.5, 8.0), "[0, 8.0)"),
        ("label_smoothing", (-0.1, 1.0), "[0, 1)"),
        *((name, (0, -1), "positive") for name in POSITIVE),
        *((name, (-1,), "0 or positive") for name in ("devices", "num_workers", "l2")),
    ],
)
def test_numbers_out_of_range_are_refused(name, values, words):
    default = getattr(Config(), name)
    for value in values:
        message = rf"{name}={value} must \w+ (in )?{re.escape(words)}; .* {default}$"
        with pytest.raises(ValueError, match=message):
            Config(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, r"kfac.momentum=1.0 must lie in \[0, 1\); .* 0.9$"),
        ({"learning_rate": 0.0}, r"kfac.learning_rate=0.0 must be positive; .* 0.03$"),
        ({"inverse_period": 0}, r"kfac.inverse_period=0 must be positive; .* 5$"),
        ({"stats_period": 0}, r"kfac.stats_period=0 must be positive; .* 1$"),
        ({"kl_clip_decay": 1.1}, r"kfac.kl_clip_decay=1.1 must lie in \(0, 1\]; "),
    ],
)
def test_numbers_of_the_optimizer_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(kfac=Kfac(**settings))
    assert Config(optimizer="sgd", kfac=Kfac(**settings)), "SGD reads none of it"


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "staircase", "decay_epochs": (1.0, 200.0)},  # a run cut short
        {"schedule": "exponential"},  # a constant
        {"schedule": "polynomial", "decay_from": "warmup", "end_value": 1e-4},
        {"optimizer": "sgd", "kfac": Kfac(kl_clip=None, kl_clip_decay=0.9)},
        {**SP_NGD, "sp_ngd": SpNgd(decay_end=35.0)},
        {**SP_NGD, "fisher": "sampled", "sp_ngd": SpNgd(fisher="sampled")},
        {"optimizer": "sgd", "fisher": "sampled"},  # beside K-FAC in a study
        {"optimizer": "lars", "lars": Lars(after_kfac=True), "doubly_factored": 512},
        {
            "optimizer": "nlcg",
            "nlcg": Nlcg(preconditioner="kfac"),
            "doubly_factored": 512,
        },
        {"optimizer": "nlcg", "label_smoothing": 0.1},
        {"eval_epochs": 100.0},  # an evaluation at the end
    ],
)
def test_what_makes_sense_is_not_refused(settings):
    assert (
        dataclasses.asdict(Config(**settings)).items()
        >= {
            name: value
            for name, value in settings.items()
            if not dataclasses.is_dataclass(value)
        }.items()
    )


def test_a_published_run_that_is_made_longer_asks_for_the_end_of_its_decay(
    tmp_path, capsys
):
    arguments = ["sp_ngd_4k", "--epochs", "60", "--directory", str(tmp_path)]
    with pytest.raises(SystemExit):
        imagenet_resnet50.main(arguments)
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "sp_ngd.decay_end=53.0 must be at least epochs=60" in text


IGNORED = [
    ({"optimizer": "sgd"}, "kfac.damping"),
    ({"optimizer": "kfac"}, "sgd.momentum"),
    ({"optimizer": "sp_ngd"}, "kfac.damping"),
    ({"optimizer": "lars"}, "kfac.damping"),
    ({"optimizer": "lars", "lars": Lars(after_kfac=True)}, "kfac.momentum"),
    ({"optimizer": "nlcg", "nlcg": Nlcg(preconditioner="kfac")}, "kfac.kl_clip"),
    ({"optimizer": "sgd"}, "fisher"),
    ({"optimizer": "rmsprop"}, "placement"),
    ({"optimizer": "nlcg"}, "statistics_fraction"),
    ({**SP_NGD}, "schedule"),
]
READ = [
    ({"optimizer": "kfac"}, "kfac.damping"),
    ({"optimizer": "lars", "lars": Lars(after_kfac=True)}, "kfac.damping"),
    ({"optimizer": "nlcg", "nlcg": Nlcg(preconditioner="kfac")}, "kfac.inverse_period"),
    ({"optimizer": "sgd"}, "recipe.image_size"),
    ({"optimizer": "sgd"}, "schedule"),
    ({**SP_NGD}, "placement"),
]


@pytest.mark.parametrize(("settings", "name"), IGNORED)
def test_settings_that_the_optimizer_does_not_read(settings, name):
    assert Config(**settings).ignores(name)


@pytest.mark.parametrize(("settings", "name"), READ)
def test_settings_that_the_optimizer_reads(settings, name):
    assert not Config(**settings).ignores(name)
