"""The mini family's text encoders: SDXL's two CLIP encoders at small size, distilled from MiniLM.

Captions use a few hundred nouns; people use many more words. So the encoders learn a sentence
encoder's (MiniLM's) embeddings of captions *and* of all words in CLIP's vocabulary: the pooled
output predicts the embedding of the text, each word's hidden state MiniLM's state of that word.
Words in no caption ("scarlet", "puppy") then end up near their synonyms.

Token embeddings start at the principal components of MiniLM's embeddings of the tokens' texts.

Letters: n texts, t tokens read, d1 and d2 the encoders' widths, W MiniLM's width (384).
"""

import gzip
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)

from koala.mini.sentence_encoder import WIDTH, SentenceEncoder
from koala.utils.asset_packages import package

TOKENS = 32  # including special tokens; SDXL reads 77
WIDTHS = (64, 96)
LAYERS = (3, 4)
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49_152 - 256 - 2  # merges of the file that CLIP uses


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, 49,408 tokens, from open-clip's vocabulary."""
    path = package("open-clip-torch") / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : MERGES + 1]
    merges = [tuple(line.split()) for line in lines if line]
    letters = _byte_letters()
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]  # pairs are what it reads; it says lines
        pad_token=pad,
        model_max_length=TOKENS,
    )


def _byte_letters() -> list[str]:
    """A printable letter for every byte (Radford et al. 2019): itself, or one above 255."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + n) for n in range(len(others))]


def new_text_encoders(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Both encoders, untrained, by their names in a pipeline folder."""

    def config(width: int, layers: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=TOKENS,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )

    return nn.ModuleDict(
        {
            "text_encoder": CLIPTextModel(config(WIDTHS[0], LAYERS[0])),
            "text_encoder_2": CLIPTextModelWithProjection(config(WIDTHS[1], LAYERS[1])),
        }
    )


@torch.no_grad()
def start_from_words(
    encoders: nn.ModuleDict, tokenizer: CLIPTokenizer, teacher: SentenceEncoder
) -> None:
    """Token embeddings := principal components of the teacher's embedding of each token's text."""
    vocabulary = tokenizer.get_vocab()
    texts = [t.removesuffix("</w>") or t for t in sorted(vocabulary, key=vocabulary.__getitem__)]
    meaning = teacher(texts).cpu()  # [49408, W]
    meaning = meaning - meaning.mean(0)
    _, _, components = torch.linalg.svd(meaning[::7], full_matrices=False)
    for encoder in encoders.values():
        assert isinstance(encoder, PreTrainedModel)
        table = encoder.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        values = meaning @ components[: table.shape[1]].T
        table.copy_(0.1 * values / values.std())


class TextData:
    """Training texts: captions, captions with one word replaced, and words of CLIP's vocabulary."""

    def __init__(self, captions: Sequence[str], words: Sequence[str], seed: int):
        self.captions, self.words, self.seed = captions, words, seed

    def batch(self, first: int, count: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """{"texts": list of `count` strings}; for a single process."""
        assert world == 1
        rng = random.Random(f"{self.seed} {first}")
        return {"texts": [self._one(rng) for _ in range(count)]}

    def _one(self, rng: random.Random) -> str:
        form = rng.random()
        if form < 0.4:
            return rng.choice(self.captions)
        if form < 0.65:
            said = rng.choice(self.captions).split()
            said[rng.randrange(len(said))] = rng.choice(self.words)
            return " ".join(said)
        some = rng.choices(self.words, k=rng.choice([1, 1, 2, 2, 3]))
        return rng.choice(["", "a ", "the "]) + " ".join(some)


def vocabulary_words(tokenizer: CLIPTokenizer) -> list[str]:
    """The tokens that are whole words of three letters or more."""
    words = (t.removesuffix("</w>") for t in tokenizer.get_vocab() if t.endswith("</w>"))
    return sorted(w for w in words if w.isascii() and w.isalpha() and len(w) > 2)


class TextDistillation(nn.Module):
    """Cosine distance of texts and words to the sentence encoder's, through linear heads."""

    def __init__(self, encoders: nn.ModuleDict, tokenizer: CLIPTokenizer, teacher: SentenceEncoder):
        super().__init__()
        heads = {"text": nn.Linear(WIDTHS[1], WIDTH), "word": nn.Linear(sum(WIDTHS), WIDTH)}
        self.trainable = nn.ModuleDict({**encoders, **{f"{k}_head": v for k, v in heads.items()}})
        self.tokenizer = tokenizer
        self._frozen = {"teacher": teacher}

    def losses(
        self, batch: dict[str, Any], generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Named scalars: "text", "word" and "alike" (similarities within the batch)."""
        texts = batch["texts"]
        teacher = self._frozen["teacher"]
        states, mask, spans = teacher.token_states(texts)  # [n, T, W]
        weight = mask[..., None].float()
        meaning = F.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)  # [n, W]
        found = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=TOKENS,
            return_offsets_mapping=True, return_tensors="pt",
        )  # fmt: skip
        ids = found.input_ids.to(states.device)
        first = self.trainable["text_encoder"](ids, output_hidden_states=True)
        second = self.trainable["text_encoder_2"](ids, output_hidden_states=True)
        pooled = second.text_embeds
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        said = F.normalize(self.trainable["text_head"](pooled), dim=-1)
        text = 1 - (said * meaning).sum(-1).mean()
        unit = F.normalize(pooled, dim=-1)
        alike = F.mse_loss(unit @ unit.T, meaning @ meaning.T)
        rows, ours, theirs = _word_ends(texts, found.offset_mapping, spans)
        words = F.normalize(self.trainable["word_head"](hidden[rows, ours]), dim=-1)
        word = 1 - (words * F.normalize(states[rows, theirs], dim=-1)).sum(-1).mean()
        return {"text": text, "word": word, "alike": alike, "loss": text + word + 4 * alike}

    def preview(self, trainable: nn.Module) -> Image.Image | None:
        """Nothing to draw."""
        return None

    def export(self, trainable: nn.Module, folder: Path) -> None:
        """Writes text_encoder, text_encoder_2 and their tokenizers into `folder`."""
        assert isinstance(trainable, nn.ModuleDict)
        for name in ("text_encoder", "text_encoder_2"):
            encoder = trainable[name]
            assert isinstance(encoder, PreTrainedModel)
            encoder.save_pretrained(folder / name)
        clip_tokenizer().save_pretrained(folder / "tokenizer")
        clip_tokenizer(pad="!").save_pretrained(folder / "tokenizer_2")


def _word_ends(
    texts: Sequence[str], ours: Tensor, theirs: Tensor
) -> tuple[list[int], list[int], list[int]]:
    """The end of each word: its text, the position of its last token here and in the teacher."""
    rows, here, there = [], [], []
    for n, text in enumerate(texts):
        ends = {i + 1 for i, c in enumerate(text) if not c.isspace() and text[i + 1 : i + 2] in " "}
        mine = {int(e): i for i, (s, e) in enumerate(ours[n].tolist()) if e > s}
        its = {int(e): i for i, (s, e) in enumerate(theirs[n].tolist()) if e > s}
        for end in sorted(ends & mine.keys() & its.keys()):
            rows.append(n)
            here.append(mine[end])
            there.append(its[end])
    return rows, here, there
