"""data/pictures.py: which images are drawn, what is written below them, the frame around a mistake, the table."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from data.pictures import WRONG, caption, choose, draw_predictions, per_class_table

CLASSES = ("tench", "English springer", "gas|pump")


def case(n: int, wrong: tuple[int, ...] = (), shape=(9, 9, 3)):
    """Images, labels and probabilities; of the images in `wrong` another class is likelier, the more so the later."""
    labels = np.arange(n) % 3
    said = labels.copy()
    said[list(wrong)] = (labels[list(wrong)] + 1) % 3
    sure = np.full(n, 0.6)
    sure[list(wrong)] += 0.01 * np.arange(len(wrong))
    probabilities = np.repeat((1 - sure)[:, None] / 2, 3, axis=1)
    probabilities[np.arange(n), said] = sure
    return np.zeros((n, *shape), np.uint8), labels, probabilities


def test_two_thirds_are_spread_evenly_and_one_is_the_surest_mistakes():
    _, labels, probabilities = case(101, wrong=(3, 50, 7, 20))
    spread, mistakes = choose(labels, probabilities, 9)
    assert spread.tolist() == [0, 20, 40, 60, 80, 100] and mistakes.tolist() == [20, 7, 50]
    assert [len(part) for part in choose(labels, probabilities, 24)] == [16, 4]
    assert [len(part) for part in choose(labels[:2], probabilities[:2], 24)] == [2, 0]


def test_of_equally_sure_mistakes_the_first_is_drawn():
    labels, probabilities = np.zeros(99, np.int64), np.tile([0.2, 0.8], (99, 1))
    assert choose(labels, probabilities, 90)[1].tolist() == list(range(30))


def test_a_caption_says_what_is_predicted_and_of_a_mistake_what_is_true():
    p = np.array([0.25, 0.7, 0.05])
    assert caption(1, p, CLASSES) == "English springer\n70 %"
    assert caption(0, p, CLASSES) == "English springer\n70 %, but it is\ntench (25 %)"
    assert caption(0, np.array([1.0]), ["a class of a very long name"]) == "a class of a...\n100 %"
    assert caption(0, np.array([1.0]), ["Donaudampfschifffahrt"]) == "Donaudampfschifff\n100 %"


def frames(png) -> int:
    """Pixels of the colour that frames a mistake."""
    color = [round(255 * part) for part in matplotlib.colors.to_rgb(WRONG)]
    return int((np.asarray(Image.open(png).convert("RGB")) == color).all(axis=-1).sum())


@pytest.mark.parametrize("shape", [(9, 9, 3), (6, 12, 1)], ids=["colour", "grey, wide"])
def test_mistakes_and_nothing_else_are_framed(tmp_path, shape):
    images, labels, probabilities = case(10, wrong=(0,), shape=shape)
    draw_predictions(tmp_path / "wrong.png", images, labels, probabilities, CLASSES, count=6)
    draw_predictions(tmp_path / "right.png", images, labels, case(10)[2], CLASSES, count=6)
    assert frames(tmp_path / "wrong.png") > 1000 and frames(tmp_path / "right.png") == 0


def test_one_image_and_names_with_the_signs_of_formulas_can_be_drawn(tmp_path):
    draw_predictions(tmp_path / "one.png", np.zeros((1, 2, 2, 1), np.uint8), [0], np.ones((1, 1)), ["$\\frac{$"])
    assert min(Image.open(tmp_path / "one.png").size) > 100


def test_the_table_counts_images_right_ones_and_the_most_frequent_mistake():
    labels = [0] * 1200 + [1] * 4
    predicted = [0] * 900 + [1] * 100 + [2] * 200 + [1, 1, 0, 2]
    assert per_class_table(labels, predicted, CLASSES).splitlines() == [
        "| class            | images |  right | most often taken for |",
        "|------------------|-------:|-------:|----------------------|",
        "| tench            |  1,200 | 75.0 % | gas\\|pump (200)      |",
        "| English springer |      4 | 50.0 % | tench (1)            |",
        "| gas\\|pump        |      0 |      - | -                    |",
        "| all              |  1,204 | 74.9 % |                      |",
    ]
