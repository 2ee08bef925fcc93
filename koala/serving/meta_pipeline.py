"""A model without weights, to check requests in a process that does not run the model."""

from transformers import CLIPTokenizer

from koala.checkpoints.load import load_scheduler_config
from koala.checkpoints.resolve import name_of, resolve_model
from koala.generation import Pipeline
from koala.generation.memory.meta_models import TEXT, UNET, VAE, MetaModels
from koala.text_conditioning import TextConditioner


def load_meta_pipeline(model: str) -> Pipeline:
    """The pipeline of `load(model)` on the meta device: only `requests` works. UserError."""
    folder = resolve_model(model)
    parts = MetaModels(folder, None, (64, 64), 1)
    ((unet,), (vae,)) = (parts.models(part, "fp32") for part in (UNET, VAE))
    tokenizers = (
        CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
        for name in ("tokenizer", "tokenizer_2")
    )
    return Pipeline(
        name=name_of(model),
        unet=unet,
        vae=vae,
        conditioner=TextConditioner(*tokenizers, *parts.models(TEXT, "fp32")),
        scheduler_config=load_scheduler_config(folder),
    )
