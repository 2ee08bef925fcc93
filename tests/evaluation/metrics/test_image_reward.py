"""ImageReward in its published format, against BLIP's vision model and transformers' BERT."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer, CLIPImageProcessorPil

from koala.errors import UserError
from koala.evaluation.metrics.catalogue import METRICS
from koala.evaluation.metrics.image_reward import DEVIATION, MEAN, TOKENS
from koala.evaluation.metrics.metric import create
from koala.evaluation.prompts import Prompt
from toy_metrics import lively, random_pictures, seeded

CPU = torch.device("cpu")
WIDTH = 128  # of both models: two heads
TEXTS = ["a red fox", "an owl " * 40, "x"]
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(TEXTS)]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "an", "owl"]


class Block(nn.Module):
    """A layer of BLIP's vision model, with the authors' names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        n, places, _ = x.shape
        heads = self.attn.qkv(self.norm1(x)).view(n, places, 3, 2, WIDTH // 2).transpose(1, 3)
        mixed = nn.functional.scaled_dot_product_attention(*heads.unbind(2))
        x = x + self.attn.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Vision(nn.Module):
    """BLIP's vision model for 32-pixel pictures in patches of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, pixels):
        patches = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@pytest.fixture(scope="module")
def parts():
    """(vision, text, reward), as the authors compose them; BERT may look at pictures."""
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, add_cross_attention=True,
        is_decoder=True,
    )  # fmt: skip
    with seeded():
        vision, text = (
            lively(Vision(), 0.1),
            lively(BertModel(config, add_pooling_layer=False), 0.1),
        )
        reward = nn.Sequential(
            nn.Linear(WIDTH, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 1)
        )
    text.config.is_decoder = False  # it reads in both directions
    nn.init.zeros_(text.embeddings.token_type_embeddings.weight)  # BLIP has none
    return vision.eval(), text.eval(), reward.eval()


@pytest.fixture(scope="module")
def weights(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    vision, text, reward = (part.state_dict() for part in parts)
    text.pop("embeddings.token_type_embeddings.weight")
    text["embeddings.position_ids"] = torch.arange(64)[None]
    named = {
        **{f"blip.visual_encoder.{name}": t for name, t in vision.items()},
        **{f"blip.text_encoder.{name}": t for name, t in text.items()},
        **{f"mlp.layers.{name}": t for name, t in reward.items()},
    }
    torch.save(named, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return {"imagereward": folder / "ImageReward.pt", "bert-vocabulary": folder / "vocab.txt"}


@torch.inference_mode()
def test_the_reward_is_the_authors(parts, weights):
    vision, text, reward = parts
    prepare = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    seen = vision(prepare(random_pictures(3), return_tensors="pt")["pixel_values"])
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    tokens = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    read = text(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
        encoder_hidden_states=seen, encoder_attention_mask=torch.ones(seen.shape[:2]),
    ).last_hidden_state  # fmt: skip
    wanted = (reward(read[:, 0]) - MEAN) / DEVIATION
    metric = create(METRICS["imagereward"])
    metric.prepare(weights, CPU)
    found = metric.score(random_pictures(3), PROMPTS)
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_another_file_is_refused(weights, tmp_path):
    torch.save({"mlp.layers.0.weight": torch.zeros(1, 1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"is no ImageReward: give the published ImageReward\.pt"):
        create(METRICS["imagereward"]).prepare(
            {**weights, "imagereward": tmp_path / "other.pt"}, CPU
        )
