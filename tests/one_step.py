"""One training step of the quick network, alone or in two processes: see the test."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline.data.splits import Split
from pipeline.training.device import choose_placement, process_group
from pipeline.training.loop import Batches, Learner
from pipeline.training.recipes import TrainConfig, make_recipe


def main(file: Path) -> None:
    """Write the weights after the step to `file`."""
    placement = choose_placement("cpu")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (256, 1, 28, 28), dtype=np.uint8)
    split = Split(images, rng.integers(0, 10, 256), tuple("0123456789"))
    settings = replace(
        make_recipe("quick"), optimizer="sgd", lr=1.0, batch_size=128, weight_decay=0.0
    )
    with process_group(placement):
        learner = Learner(TrainConfig(settings=settings), 10, placement)
        images_, labels = Batches(split, settings, 0, placement).at(0)
        learner.model.eval()  # normalization is not a mean over the batch here
        loss = torch.nn.CrossEntropyLoss()(learner.model(images_), labels)
        loss.backward()
        learner.optimizer.step()
        if placement.is_first:
            tensors = {
                name: value.contiguous() for name, value in learner.network.state_dict().items()
            }
            save_file({**tensors, "images": torch.tensor(len(images_))}, file)
