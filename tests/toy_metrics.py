"""Tiny random weights of the metrics' models, in the formats that they are published in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
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
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from toy import END, START, toy_tokenizer, toy_vocabulary


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """A block whose random numbers are of that seed, and leave others' as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def letters(texts: list[str]) -> torch.Tensor:
    """Text features at toy size: how often each letter occurs."""
    counts = torch.tensor([[float(t.count(chr(97 + i))) for i in range(26)] for t in texts])
    return torch.nn.functional.normalize(counts, dim=-1)


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


def tower(width: int) -> dict[str, int]:
    """Two layers of a transformer."""
    return {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip


def eye(width: int) -> dict[str, int]:
    """The config of what looks at 32-pixel pictures."""
    return {**tower(width), "image_size": 32, "patch_size": 8}


def reader() -> dict[str, int]:
    """The config of what reads 32 of the toy tokenizer's tokens."""
    vocabulary = toy_vocabulary()
    return {
        **tower(16), "vocab_size": len(vocabulary), "max_position_embeddings": 32,
        "bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END],
        "pad_token_id": vocabulary[END],
    }  # fmt: skip


def toy_clip(folder: Path) -> Path:
    """A CLIPModel folder: 32-pixel pictures, 32 tokens."""
    with seeded():
        config = CLIPConfig(text_config=reader(), vision_config=eye(24), projection_dim=12)
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
        **tower(16), "vocab_size": len(words), "encoder_hidden_size": 16,
        "max_position_embeddings": 32, "bos_token_id": words.index("[DEC]"),
        "pad_token_id": 0, "eos_token_id": 2, "sep_token_id": 3,
    }  # fmt: skip
    with seeded():
        config = BlipConfig(text_config=text, vision_config=eye(16), projection_dim=8)
        lively(BlipForQuestionAnswering(config)).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def toy_owl(folder: Path) -> Path:
    """An Owlv2ForObjectDetection folder with the toy tokenizer."""
    with seeded():
        config = Owlv2Config(text_config=reader(), vision_config=eye(16), projection_dim=16)
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


CHAT = (  # a picture before the question
    "{% for said in messages %}{% for part in said['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endfor %}"
)


def toy_chat(folder: Path) -> Path:
    """A vision-language folder, LLaVA's, that knows a few words."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = [
        *special,
        *[
            "yes",
            "Yes",
            "no",
            "two",
            "Two",
            "2",
            "fox",
            "How",
            "many",
            "Is",
            "it",
            "red",
            "?",
            "Answer",
            "in",
            "one",
            "word",
        ],
    ]
    spoken = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    spoken.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=spoken, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", additional_special_tokens=["<image>"],
    )  # fmt: skip
    side = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    with seeded():
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=8),
            text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(words)),
            image_token_index=words.index("<image>"), vision_feature_layer=-1,
        )  # fmt: skip
        lively(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    return folder
