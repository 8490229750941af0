"""Trainings by frameworks, as their users write them: `python frameworks.py FOLDER KIND...`."""

import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from trainings import X, Y, fingerprint, network


def lightning(folder: str) -> str:
    from lightning import LightningModule, Trainer

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    model = Classifier()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=3, accelerator="cpu", enable_checkpointing=False, barebones=False, **quiet)
    trainer.fit(model, DataLoader(TensorDataset(X, Y), 16, shuffle=True))
    return fingerprint(model)


class Classifier(nn.Module):
    """As Hugging Face's models: the loss is among what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def huggingface(folder: str) -> str:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    model = Classifier()
    rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = TrainingArguments(
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        use_cpu=True,
        **quiet,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)  # it prints how long the training took
    trainer.train()
    return fingerprint(model)


def keras(folder: str) -> str:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((8,)),
            keras.layers.Dense(16, "relu"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    model.fit(X.numpy(), Y.numpy(), batch_size=16, epochs=3, verbose=0)
    return fingerprint([torch.as_tensor(weight) for weight in model.get_weights()])


KINDS = {"lightning": lightning, "huggingface": huggingface, "keras": keras}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, *names = sys.argv[1:]
    for name in names:
        sys.stdout.write(f"{name} {KINDS[name](folder)}\n")
