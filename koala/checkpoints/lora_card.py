"""The card (README.md) of a LoRA that `koala finetune` trained."""

from pathlib import Path

from koala.checkpoints.card_facts import ModelCard, Trained
from koala.checkpoints.card_text import training_of
from koala.checkpoints.model_card import FILE
from koala.utils.atomic import write_text


def write(folder: Path, name: str, base: ModelCard, trained: Trained) -> None:
    """Writes README.md into a LoRA's folder.

    name: of the file in kohya's spelling. base: the card of the model that it is for; its licence
    is the LoRA's. trained: how.
    """
    from huggingface_hub import ModelCardData

    model = trained.teacher or ""
    on_hub = "/".join(model.split("/")[:2]) if "/" in model else base.base_model
    data = ModelCardData(
        license=base.licence.identifier,
        license_name=base.licence.name,
        license_link=base.licence.link,
        base_model=on_hub,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "stable-diffusion-xl", "text-to-image"],
    )
    write_text(folder / FILE, f"---\n{data.to_yaml()}\n---\n\n{_text(name, model, trained)}\n")


def _text(name: str, model: str, trained: Trained) -> str:
    return f"""# {name}

A LoRA for the U-Net of **{model}**, trained by its denoising loss alone.

## Use

With diffusers:

```python
from diffusers import StableDiffusionXLPipeline

pipe = StableDiffusionXLPipeline.from_pretrained("{model}")
pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")
```

With koala, and with programs that read kohya's spelling:

```sh
koala generate "a red fox" --model {model} --lora {name}.safetensors
```

## How it was made

{training_of(trained)}"""
