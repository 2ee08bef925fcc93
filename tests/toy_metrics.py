"""Tiny random weights of the metrics' models, in the formats that they are published in."""

from pathlib import Path

import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    SwinConfig,
)

from toy import END, START, toy_tokenizer, toy_vocabulary


def seeded(seed: int = 0):
    """A block whose random numbers are of that seed, and leave others' as they were."""
    context = torch.random.fork_rng(devices=[])
    return _Seeded(context, seed)


class _Seeded:
    def __init__(self, context, seed):
        self.context, self.seed = context, seed

    def __enter__(self):
        self.context.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error):
        return self.context.__exit__(*error)


def lively(model, std: float = 0.3):
    """The model with larger weights, so that what it is shown matters."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


def random_pictures(n: int, size: tuple[int, int] = (40, 56), seed: int = 0) -> list[Image.Image]:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, size[1] // 8, size[0] // 8, 3), generator=draw)
    small = (Image.fromarray(p.to(torch.uint8).numpy()) for p in pixels)
    return [image.resize(size, Image.Resampling.BICUBIC) for image in small]


def toy_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIPModel folder: 32-pixel pictures, 32 tokens."""
    vocabulary = toy_vocabulary()
    text = {
        "vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
        "bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END],
        "pad_token_id": vocabulary[END],
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    with seeded(seed):
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        lively(CLIPModel(config)).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def toy_clip_vision(folder: Path) -> Path:
    with seeded():
        config = CLIPVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=28, patch_size=7, projection_dim=10,
        )  # fmt: skip
        lively(CLIPVisionModelWithProjection(config)).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    return folder


def toy_dino(folder: Path) -> Path:
    with seeded():
        config = Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14, mlp_ratio=2,
        )  # fmt: skip
        lively(Dinov2Model(config), 0.1).save_pretrained(folder)
    return folder


def toy_blip(folder: Path) -> Path:
    """A BlipForQuestionAnswering folder that knows a few words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "red", "fox", "is",
             "there", "?", "an", "owl", "[DEC]", "[ENC]"]  # fmt: skip
    text = {
        "vocab_size": len(words), "hidden_size": 16, "encoder_hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "bos_token_id": words.index("[DEC]"),
        "pad_token_id": 0, "eos_token_id": 2, "sep_token_id": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    with seeded():
        config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
        lively(BlipForQuestionAnswering(config)).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def toy_owl(folder: Path) -> Path:
    """An Owlv2ForObjectDetection folder with the toy tokenizer."""
    vocabulary = toy_vocabulary()
    text = {
        "vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
        "bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END],
        "pad_token_id": vocabulary[END],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    with seeded():
        config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
        lively(Owlv2ForObjectDetection(config)).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def toy_mask2former(folder: Path, classes: list[str]) -> Path:
    """A Mask2FormerForUniversalSegmentation folder with the classes' names."""
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    with seeded():
        config = Mask2FormerConfig(
            backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, dim_feedforward=16,
            num_attention_heads=2, num_queries=6, id2label=dict(enumerate(classes)),
            label2id={name: i for i, name in enumerate(classes)},
        )  # fmt: skip
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    Mask2FormerImageProcessorPil(size=size, size_divisor=32).save_pretrained(folder)
    return folder
