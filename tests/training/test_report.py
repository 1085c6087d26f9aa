"""Crossing steps, and the picture of a run."""

import json

import numpy as np
import pytest

from muonlm.training import report

HISTORY = [
    {"step": s, "train_acc": t, "val_acc": v, "train_loss": 1 / (s + 1), "val_loss": 2 / (s + 1)}
    for s, t, v in [
        (0, 0.0, 0.0),
        (100, 0.5, 0.1),
        (200, 1.0, 0.2),
        (300, 0.9999, 0.989),
        (400, 1.0, 0.99),
        (500, 1.0, 1.0),
        (600, 1.0, 0.999),
    ]
]


def test_crossings_are_the_first_evaluations_that_reach_their_level():
    history = [{"step": 50, "loss": 1.0, "acc": 1.0}, *HISTORY]  # a training line has no whole-split accuracy
    assert report.crossings(history) == {
        "train_99_step": 200,
        "train_100_step": 200,
        "val_99_step": 400,
        "val_100_step": 500,
        "delay_ratio": 2.0,
    }


def test_what_was_not_reached_is_none_and_a_run_without_accuracies_has_none():
    assert report.crossings(HISTORY[:4]) == {
        "train_99_step": 200,
        "train_100_step": 200,
        "val_99_step": None,
        "val_100_step": None,
        "delay_ratio": None,
    }
    assert report.crossings([{"step": 1, "loss": 2.0}]) == {}


@pytest.mark.parametrize(
    "history",
    [
        HISTORY,
        [{"step": s, "loss": 3 - s / 100} for s in range(100)]
        + [{"step": s, "val_loss": 3.1 - s / 100} for s in range(0, 101, 20)],
    ],
    ids=["accuracies", "losses"],
)
def test_the_picture_is_written_and_shows_something(tmp_path, history):
    pytest.importorskip("matplotlib")
    import matplotlib.image

    (tmp_path / "report.json").write_text(json.dumps({"recipe": "r", "seed": 1, "run": str(tmp_path)}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in history))
    said = []
    result = report.write(tmp_path, said.append)
    picture = matplotlib.image.imread(result["curves"])[..., :3]
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    colourful = (np.ptp(picture, axis=-1) > 0.3).mean()  # curves are coloured, axes and text are grey
    assert 0.001 < colourful < 0.2
    assert json.loads((tmp_path / "report.json").read_text()) == result and any("curves.png" in line for line in said)


def test_a_run_without_metrics_has_a_report_and_no_picture(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"recipe": "r", "seed": 1}))
    assert "curves" not in report.write(tmp_path, print) and not (tmp_path / "report").exists()
