"""The mini family at toy size: prepared pictures, and a base pipeline that has learnt nothing."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from koala.architectures.config import unet_config
from koala.architectures.table import get
from koala.checkpoints.bundled import BUNDLED
from koala.data.illustrations.images import prepare_images
from koala.data.prepare import encode_images
from koala.distillation.settings import Training
from koala.mini.runs import assemble
from koala.mini.text import TextDistillation, clip_tokenizer, new_text_encoders, start_from_words
from koala.mini.vae import Autoencoding, new_vae
from toy_packages import TOY

TINY = Training(samples=8, batch=4, lr=1e-3, ema_half_life=8, log_every=4, preview_every=8)


class Letters:
    """A sentence encoder at toy size: counts of letters, for texts and for their tokens."""

    def __call__(self, texts):
        rows = [[float(t.count(chr(97 + i % 26))) + i % 3 for i in range(384)] for t in texts]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)

    def token_states(self, texts):
        words = [t.split() for t in texts]
        longest = max(map(len, words))
        states = torch.zeros(len(texts), longest, 384)
        mask = torch.zeros(len(texts), longest, dtype=torch.bool)
        spans = torch.zeros(len(texts), longest, 2, dtype=torch.long)
        for n, row in enumerate(words):
            end = 0
            for i, word in enumerate(row):
                start = texts[n].index(word, end)
                end = start + len(word)
                states[n, i], mask[n, i] = self([word])[0], True
                spans[n, i] = torch.tensor([start, end])
        return states, mask, spans


def toy_mini_base(folder: Path) -> tuple[Path, Path]:
    """A prepared folder and an untrained base pipeline of the mini family's own sizes."""
    data = folder / "data"
    prepare_images(replace(TOY, scenes=20, icons=10, size=64), data, workers=1)
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    encoders = new_text_encoders(tokenizer)
    start_from_words(encoders, tokenizer, Letters())
    telling = TextDistillation(encoders, tokenizer, Letters())
    coding = Autoencoding(new_vae(64), torch.zeros(2, 3, 64, 64))
    base = assemble(folder / "base", coding, telling, data)
    encode_images(data, base)
    return data, base


def untrained_teacher(folder: Path) -> UNet2DConditionModel:
    """Writes the bundled student's teacher, its U-Net as initialised, and returns that."""
    shutil.copytree(BUNDLED / "koala-mini", folder, ignore=shutil.ignore_patterns("unet"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**unet_config(get("sdxl-mini")))
    unet.save_pretrained(folder / "unet")
    return unet
