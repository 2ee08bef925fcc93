"""Models that answer questions about pictures, as probabilities of an answer.

Letters: n pairs of a picture and a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
)

from koala.evaluation.metrics.loading import pretrained

BATCH = 16  # pairs in one forward pass
LONGEST = 35  # tokens of a question


class Blip:
    """BLIP for questions with the answers yes and no."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        model = pretrained(BlipForQuestionAnswering, folder)
        self.model = model.requires_grad_(False).eval().to(device)
        self.tokenizer: Any = pretrained(AutoTokenizer, folder)
        self.prepare = pretrained(BlipImageProcessorPil, folder)
        self.device = device

    def yes(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> Tensor:
        """float32 [n]: P(yes) / (P(yes) + P(no)) for the answer's first token.

        So T2I-CompBench's BLIP-VQA reads its model, which was trained with the token [ENC] before
        a question.
        """
        asked = self.tokenizer(list(questions), truncation=True, max_length=LONGEST)["input_ids"]
        found = torch.empty(len(asked))
        for length in {len(ids) for ids in asked}:  # transformers' decoder attends to padding
            same = [i for i, ids in enumerate(asked) if len(ids) == length]
            for start in range(0, len(same), BATCH):
                rows = same[start : start + BATCH]
                ids = torch.tensor([asked[i] for i in rows], device=self.device)
                found[rows] = self._yes([pictures[i] for i in rows], ids).cpu()
        return found

    def _yes(self, pictures: list[Image.Image], ids: Tensor) -> Tensor:
        """`yes` of questions of one length, as ids [n, tokens]."""
        ids[:, 0] = self.model.decoder_start_token_id + 1  # [ENC] in place of [CLS]
        pixels = self.prepare(pictures, return_tensors="pt")["pixel_values"]
        seen = self.model.vision_model(pixels.to(self.device)).last_hidden_state
        states = self.model.text_encoder(
            input_ids=ids, encoder_hidden_states=seen, return_dict=True
        ).last_hidden_state
        first = torch.full((len(ids), 1), self.model.decoder_start_token_id, device=self.device)
        logits = self.model.text_decoder(
            input_ids=first, encoder_hidden_states=states, return_dict=True
        ).logits[:, 0]
        words = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        return logits[:, words].float().softmax(-1)[:, 0]


class ChatModel:
    """A vision-language model that is asked for one word, such as Qwen3-VL."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model: Any = pretrained(AutoModelForImageTextToText, folder, dtype=dtype)
        self.model = model.requires_grad_(False).eval().to(device)
        self.processor: Any = pretrained(AutoProcessor, folder)
        self.device = device

    def probability(self, picture: Image.Image, question: str, answers: Sequence[str]) -> float:
        """How likely the next token begins one of the answers, in 0..1."""
        said = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": said}], tokenize=True, add_generation_prompt=True,
            return_dict=True, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        chances = self.model(**inputs).logits[0, -1].float().softmax(-1)
        encode = self.processor.tokenizer.encode
        tokens = {encode(answer, add_special_tokens=False)[0] for answer in answers}
        return float(chances[sorted(tokens)].sum())
