"""A pipeline that is never in memory as a whole: its layers are read as they run."""

from pathlib import Path

from koala.checkpoints.load import load_scheduler_config, stream_text, without_weights
from koala.checkpoints.prune import unet_of
from koala.checkpoints.streamed import StoredWeights
from koala.checkpoints.validate import check_unet, read_json, read_tensors, unet_architecture
from koala.generation.pipeline import Pipeline
from koala.generation.prompts import CACHED_CHUNKS
from koala.text_conditioning import TextConditioner
from koala.utils.networks import AutoencoderKL


def streamed_pipeline(folder: Path, name: str) -> Pipeline:
    """Text encoders and U-Net of a checked model folder, in float32 on the CPU.

    The VAE has no weights: it is there for what a request asks of its shape.
    """
    index = read_json(folder / "model_index.json")
    stored = read_tensors(folder, "unet")
    check_unet(unet_architecture(folder), stored, folder)
    with without_weights():
        vae = AutoencoderKL.from_config(read_json(folder / "vae" / "config.json"))
    return Pipeline(
        name=name,
        unet=unet_of(read_json(folder / "unet" / "config.json"), StoredWeights(stored)),
        vae=vae.eval(),
        conditioner=TextConditioner(*stream_text(folder), cache_size=CACHED_CHUNKS),
        scheduler_config=load_scheduler_config(folder),
        zeros_for_empty=index.get("force_zeros_for_empty_prompt", True),
    )
