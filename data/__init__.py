"""What a run learns from: texts and images, found, checked, prepared once, each behind one interface (data/task.py).

    task = data.load(cfg)
    for x, y in task.batches(step, device):  ...  task.loss(net(x), y)
    task.evaluate(net, device)               ->  {"val_loss": ..., "accuracy": ...}

text.py and images.py load the data alone; text_task.py and image_task.py make the batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.task import Task
    from run.config import Config


def load(cfg: Config, named: bool = False) -> Task:
    """The task of cfg.data; `named` tells whether a person asked for that data set by name (--data NAME).

    Where Tiny Shakespeare is found nowhere and was not named, the task is about the text that Python carries: `notice`
    and `cfg` of the task say so. Raises UserError for whatever a person can mend.
    """
    # Only what the task needs is imported: Pillow for images, tiktoken and regex for a BPE vocabulary.
    if cfg.of_images:
        from data import image_task

        return image_task.load(cfg)
    from data import text_task

    return text_task.load(cfg, named)
