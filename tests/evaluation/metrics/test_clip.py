"""CLIP's metrics, against transformers' own results on the same inputs."""

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from koala.errors import UserError
from koala.evaluation.metrics.catalogue import METRICS
from koala.evaluation.metrics.metric import create
from koala.evaluation.metrics.open_clip_format import converted, shape_of
from koala.evaluation.prompts import Prompt
from toy import toy_tokenizer
from toy_metrics import lively, random_pictures, seeded, toy_clip

CPU = torch.device("cpu")
TEXTS = ["a red fox", "an owl, in the rain, at night, far away from everything", "x"]
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return toy_clip(tmp_path_factory.mktemp("clip") / "model")


def expected(folder) -> tuple[torch.Tensor, float]:
    """transformers' logits per picture of each pair, and its scale."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    text = tokenizer(TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(random_pictures(3), return_tensors="pt")
    with torch.no_grad():
        logits = model(**text, **pixels).logits_per_image.diagonal()
    return logits, float(model.logit_scale.exp())


@torch.inference_mode()
def scored(name: str, weights: dict, pictures=None) -> torch.Tensor:
    metric = create(METRICS[name])
    metric.prepare(weights, CPU)
    return metric.score(pictures or random_pictures(3), PROMPTS)


def test_clip_score_and_pickscore_are_transformers_logits(clip):
    logits, scale = expected(clip)
    assert logits.std() > 0.1
    found = scored("clip-score", {"clip-vit-large-patch14": clip})
    torch.testing.assert_close(found[:, 0], (100 * logits / scale).clamp_min(0), atol=1e-4, rtol=0)
    found = scored("pickscore", {"pickscore": clip})
    torch.testing.assert_close(found[:, 0], logits, atol=1e-4, rtol=0)


def test_scores_do_not_depend_on_the_batch(clip):
    metric = create(METRICS["pickscore"])
    metric.prepare({"pickscore": clip}, CPU)
    pictures = random_pictures(20)
    prompts = [PROMPTS[i % 3] for i in range(20)]
    with torch.inference_mode():
        alone = [metric.score([p], [q]) for p, q in zip(pictures, prompts, strict=True)]
        together = metric.score(pictures, prompts)
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-4, rtol=0)


def test_the_aesthetic_head_is_the_published_stack(clip, tmp_path):
    """`layers.N` with dropout between, as the published file names its linear layers."""
    with seeded(2):
        head = nn.Sequential(
            nn.Linear(12, 8), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 1)
        ).eval()
    file = tmp_path / "head.pth"
    torch.save({f"layers.{name}": t for name, t in head.state_dict().items()}, file)
    found = scored("aesthetic", {"clip-vit-large-patch14": clip, "aesthetic": file})
    model = CLIPModel.from_pretrained(clip)
    prepare = CLIPImageProcessorPil.from_pretrained(clip)
    with torch.no_grad():
        pixels = prepare(random_pictures(3), return_tensors="pt")["pixel_values"]
        pooled = model.visual_projection(model.vision_model(pixels).pooler_output)
        wanted = head(nn.functional.normalize(pooled, dim=-1))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


class Block(nn.Module):
    """A layer as open_clip has it, with PyTorch's own attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp.c_proj(nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClip(nn.Module):
    """CLIP with open_clip's names and shapes: 32-pixel pictures, the toy tokenizer's 32 tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.visual, self.ln_final = nn.Module(), nn.LayerNorm(64)
        self.visual.conv1 = nn.Conv2d(3, 128, 8, 8, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(128))
        self.visual.positional_embedding = nn.Parameter(torch.randn(17, 128))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(128), nn.LayerNorm(128)
        self.visual.transformer, self.transformer = Tower(128, 2), Tower(64, 1)
        self.visual.proj = nn.Parameter(torch.randn(128, 12))
        self.token_embedding = nn.Embedding(tokens, 64)
        self.positional_embedding = nn.Parameter(torch.randn(32, 64))
        self.text_projection = nn.Parameter(torch.randn(64, 12))
        self.logit_scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, pixels, ids):
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        first = v.class_embedding.expand(len(x), 1, -1)
        x = v.ln_pre(torch.cat([first, x], 1) + v.positional_embedding)
        image = v.ln_post(v.transformer(x)[:, 0]) @ v.proj
        y = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        y = self.ln_final(self.transformer(y, mask))
        text = y[torch.arange(len(y)), ids.argmax(-1)] @ self.text_projection
        normal = nn.functional.normalize
        return (normal(image, dim=-1) * normal(text, dim=-1)).sum(-1)


@pytest.fixture(scope="module")
def open_clip_file(tmp_path_factory):
    with seeded(3):
        model = lively(OpenClip(len(toy_tokenizer())), 0.1).eval()
    file = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": model.state_dict()}, file)
    return model, file


def test_hpsv2_is_a_hundred_cosines_of_open_clips_model(open_clip_file):
    model, file = open_clip_file
    metric = create(METRICS["hpsv2.1"])
    metric.tokenizer = tokenizer = toy_tokenizer()
    metric.prepare({"hpsv2.1": file}, CPU)
    side = {"height": 32, "width": 32}
    prepare = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)
    ids = tokenizer(TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
    pixels = prepare(random_pictures(3), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        found = metric.score(random_pictures(3), PROMPTS)[:, 0]
        wanted = 100 * model(pixels, ids["input_ids"])
    assert wanted.std() > 1
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)  # of numbers up to a hundred


def test_every_tensor_of_open_clips_finds_its_place(open_clip_file):
    tensors = open_clip_file[0].state_dict()
    model = CLIPModel(CLIPConfig(**shape_of(tensors, "x")))
    assert not any(model.load_state_dict(converted(tensors), strict=True))


def test_open_clips_own_model_gives_the_same():
    open_clip = pytest.importorskip("open_clip", exc_type=(ImportError, RuntimeError))
    vision = open_clip.CLIPVisionCfg(
        layers=2, width=128, head_width=64, patch_size=16, image_size=64
    )
    text = open_clip.CLIPTextCfg(context_length=77, vocab_size=514, width=64, heads=1, layers=2)
    with seeded(4):
        theirs = lively(open_clip.CLIP(32, vision, text), 0.1).eval()
        pixels, ids = torch.randn(3, 3, 64, 64), torch.randint(1, 500, (3, 77))
    ids[:, 0], ids[:, 9], ids[:, 10:] = 512, 513, 0
    tensors = theirs.state_dict()
    ours = CLIPModel(CLIPConfig(**shape_of(tensors, "x"))).eval()
    ours.load_state_dict(converted(tensors), strict=False)
    with torch.no_grad():
        a = theirs.encode_image(pixels), theirs.encode_text(ids)
        b = (
            ours.visual_projection(ours.vision_model(pixels).pooler_output),
            ours.text_projection(ours.text_model(input_ids=ids).pooler_output),
        )
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_files_that_are_no_weights_are_refused(clip, tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"state_dict": {"fox": torch.ones(2)}}, file)
    with pytest.raises(UserError, match="is no CLIP in open_clip's format"):
        scored("hpsv2.1", {"hpsv2.1": file})
    torch.save({"state_dict": 3}, file)
    with pytest.raises(UserError, match="holds no named tensors"):
        scored("hpsv2.1", {"hpsv2.1": file})
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        scored("hpsv2.1", {"hpsv2.1": file})
    (clip / ".." / "empty").resolve().mkdir()
    with pytest.raises(UserError, match="does not hold a CLIPModel"):
        scored("pickscore", {"pickscore": (clip / ".." / "empty").resolve()})


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        scored("hpsv2.1", {"hpsv2.1": tmp_path / "x.pt"})
    assert not (tmp_path / "ran").exists()


def test_pictures_of_any_mode_and_size_are_scored(clip):
    pictures = [Image.new("RGB", size, "red") for size in ((32, 32), (90, 30), (7, 200))]
    assert scored("pickscore", {"pickscore": clip}, pictures).isfinite().all()
