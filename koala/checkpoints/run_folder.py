"""The folder of a training, given as a model: what it made, or the average in a checkpoint.

A student's training keeps the model that it began as in RUN/start, and the average of its weights
in every checkpoint (`koala.distillation.checkpoint`). Together they are a model, also while the
training goes on, or after it was stopped.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from koala.architectures.layout import tensor_shapes
from koala.checkpoints import card_text, model_card
from koala.checkpoints.card_facts import Assembled
from koala.checkpoints.pipeline_files import Contents, from_folder
from koala.checkpoints.tensors import View, read_header
from koala.checkpoints.validate import read_json, tensor_faults
from koala.errors import UserError

_STATE = "state.safetensors"


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training, or of one of its checkpoints."""
    return (folder / "run.json").is_file() or (folder / _STATE).is_file()


def result_of(folder: Path) -> Path:
    """What a training's folder stands for: the model that it made, else its newest checkpoint.

    folder: RUN, or RUN/checkpoints/SAMPLES for that one. Returns a model folder, or a checkpoint's
    file. UserError if there is neither.
    """
    if (folder / _STATE).is_file():
        return folder / _STATE
    if (folder / "model").is_dir():
        return folder / "model"
    if (folder / "lora").is_dir():
        raise UserError(f"{folder} made a LoRA: give the file in {folder / 'lora'} with --lora")
    states = sorted(s for s in folder.glob(f"checkpoints/*/{_STATE}") if s.parent.name.isdigit())
    if not states:
        raise UserError(
            f"{folder} is a training that has neither finished nor saved a checkpoint: train it "
            "further, koala runs tells how far it is"
        )
    return states[-1]


def describe(state: Path) -> str:
    """How far the training of a checkpoint has come."""
    run = state.parents[2]
    samples = read_json(run / "run.json")["samples"]
    return f"{run}, after {int(state.parent.name):,} of {samples:,} samples"


def read_checkpoint(state: Path) -> Contents:
    """The model that a student's training began as, with the average in one of its checkpoints.

    UserError if it is another kind of training.
    """
    run = state.parents[2]
    if not (run / "start" / "model_index.json").is_file():
        raise UserError(
            f"{run} has not finished, and only a student's training can be read before it has: run "
            "the same koala command again to go on"
        )
    start = from_folder(run / "start")
    prefix = f"ema.{read_json(run / 'run.json')['ema_half_life']}."
    header = read_header(state)
    unet = {n.removeprefix(prefix): View((s,)) for n, s in header.items() if n.startswith(prefix)}
    shapes = {name: view.shape for name, view in unet.items()}
    if faults := tensor_faults(tensor_shapes(start.architecture), shapes):
        raise UserError(f"{state} does not fit the model in {run / 'start'}: {faults}")
    far = describe(state).removeprefix(f"{run.parent}/")  # no local path on a card
    trained = Assembled(f"a training that has not finished, {far}", None, None, [])
    card = replace(model_card.read(run / "start"), title=run.name, assembled=trained, cut=None)
    text = card_text.text(card, drawn=model_card.drawn_with(run / "start"))
    files = {**start.files, model_card.FILE: text.encode()}
    return replace(start, source=state, tensors={**start.tensors, "unet": unet}, files=files)
