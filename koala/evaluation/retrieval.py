"""Prompt alignment as image-to-text retrieval, by a dual encoder trained on real images only.

Two small heads project frozen image features (EfficientNet-Lite0) and text features (MiniLM) into
one space. They are trained with InfoNCE, like CLIP. This judge ranks all prompts for each image;
R@k is the share of images whose own prompt is among the first k.

Letters: n images, k captions of each, d_p and d_t widths of the features, e the common width.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from koala.errors import UserError
from koala.evaluation.models import Size, named
from koala.utils.atomic import new_file

Sentences = Callable[[list[str]], Tensor]  # n texts -> [n, d] of length 1

HIDDEN, EMBEDDING = 512, 256
EPOCHS, PATIENCE, BATCH = 60, 8, 512
HELD_OUT = 0.1  # share of the concepts, for early stopping
RANKS = (1, 5, 10)


class Head(nn.Module):
    """[n, d] -> [n, e] of unit length, after standardising with the training set's statistics."""

    mean: Tensor
    deviation: Tensor  # standard deviation

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.layers = nn.Sequential(
            nn.Dropout(0.2),
            nn.Linear(width, HIDDEN),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(HIDDEN, EMBEDDING),
        )

    def standardise_by(self, x: Tensor) -> None:
        """Sets mean and standard deviation from x [n, d]."""
        self.mean.copy_(x.mean(0))
        self.deviation.copy_(x.std(0).clamp_min(1e-3 * float(x.std()) + 1e-8))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers((x - self.mean) / self.deviation), dim=-1)


class Judge(nn.Module):
    """Two heads and a temperature. `about` describes the training, as text."""

    def __init__(self, image_width: int, text_width: int) -> None:
        super().__init__()
        self.picture = Head(image_width)
        self.text = Head(text_width)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.about: dict[str, str] = {}

    @staticmethod
    def fit(
        image_features: Tensor,
        text_features: Tensor,
        groups: Tensor,
        concepts: Tensor,
        seed: int = 0,
    ) -> "Judge":
        """Trains a judge, deterministically.

        Args:
            image_features: float [n, d_p].
            text_features: float [n, k, d_t], the captions of each image; a step uses a random one.
            groups: int64 [n]; images of one group share a caption, so they match each other's.
            concepts: int64 [n]; a tenth of the concepts is held out, and the epoch that ranks
                their captions best is returned.
            seed: of initial weights, order, captions and dropout.
        """
        n = len(image_features)
        assert text_features.shape[:2] == (n, text_features.shape[1])
        assert len(groups) == len(concepts) == n
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kept = _held_out(concepts)
            judge = Judge(image_features.shape[1], text_features.shape[2])
            judge.picture.standardise_by(image_features[~kept])
            judge.text.standardise_by(text_features[~kept].flatten(0, 1))
            train = (image_features[~kept], text_features[~kept], groups[~kept])
            held = (image_features[kept], text_features[kept][:, 0])
            reached = _train(judge, train, held)
        judge.about = {
            "pictures": str(int((~kept).sum())),
            "seed": str(seed),
            "epochs": str(reached),
        }
        return judge.eval()

    @torch.no_grad()
    def ranks(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """int64 [n]: how many wrong texts are before each image's own. A wrong text wins a tie.

        Args:
            image_features: float [n, d_p].
            text_features: float [n, d_t]; text i belongs to image i, and all texts are candidates.
                Parallel rows (the same text twice) match each other's images.
        """
        assert len(image_features) == len(text_features)
        scores = self.picture(image_features) @ self.text(text_features).T
        unit = F.normalize(text_features, dim=-1)
        right = unit @ unit.T > 1 - 1e-5
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        return ((scores >= best) & ~right).sum(1)

    def retrieval(self, image_features: Tensor, text_features: Tensor) -> dict[str, float]:
        """R@1, R@5 and R@10 from image to text, in 0..1, of the same arguments as `ranks`."""
        before = self.ranks(image_features, text_features)
        return {f"R@{k}": float((before < k).double().mean()) for k in RANKS}

    def save(self, path: Path) -> None:
        """Writes a safetensors file, atomically."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with new_file(path) as part:
            save_file(tensors, part, metadata={"koala-judge": json.dumps(self.about)})

    @staticmethod
    def load(path: Path) -> "Judge":
        """Reads a file that `save` wrote. UserError if it is missing or not a judge."""
        try:
            with safe_open(path, framework="pt") as file:
                about = (file.metadata() or {}).get("koala-judge")
                if about is None:
                    raise UserError(
                        f"{path} is not a judge: give the judge.safetensors of a report"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the judge {path} cannot be read ({error}): give the judge.safetensors of a report"
            ) from None
        judge = Judge(len(tensors["picture.mean"]), len(tensors["text.mean"]))
        judge.load_state_dict(tensors)
        judge.about = json.loads(about)
        return judge.eval()


def train_judge(
    rows: Sequence[dict[str, Any]], features: Tensor, sentences: Sentences, size: Size
) -> Judge:
    """A judge of pictures of that size. rows: of the illustrations; features: of their pictures."""
    texts = [sentences([row[caption] for row in rows]).cpu() for caption in ("short", "long")]

    def numbered(names: list[str]) -> Tensor:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([numbers[name] for name in names])

    groups = numbered([row["short"] for row in rows])
    concepts = numbered([row["concept"] for row in rows])
    judge = Judge.fit(features, torch.stack(texts, 1).float(), groups, concepts)
    judge.about["size"] = named(size)
    return judge


def load_judge(path: Path, size: Size) -> Judge:
    """The judge of an earlier report. UserError if it was trained at another size."""
    judge = Judge.load(path)
    if judge.about.get("size") != named(size):
        raise UserError(
            f"the judge {path} was trained on {judge.about.get('size')} pixels, the models "
            f"generate {named(size)}: leave it out to train one"
        )
    return judge


def check_judge(judge: Judge, features: Tensor, texts: Tensor) -> None:
    """UserError unless the judge was trained on features like these."""
    widths = len(judge.picture.mean), len(judge.text.mean)
    if widths != (features.shape[1], texts.shape[1]):
        raise UserError(
            f"the judge was trained on features of widths {widths}, these have "
            f"{features.shape[1], texts.shape[1]}: leave it out to train one"
        )


def _held_out(concepts: Tensor) -> Tensor:
    """bool [n], true for the images of a tenth of the concepts, at least of one."""
    names = concepts.unique()
    assert len(names) >= 2, "a judge needs two concepts: one to train on, one to hold out"
    drawn = names[torch.randperm(len(names))[: max(1, round(HELD_OUT * len(names)))]]
    return torch.isin(concepts, drawn)


def _train(judge: Judge, train: tuple[Tensor, Tensor, Tensor], held: tuple[Tensor, Tensor]) -> int:
    """Trains with early stopping on the held-out images; returns the best epoch."""
    images, texts, groups = train
    optimiser = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.1)
    best, best_epoch, weights = -1.0, 0, {}
    for epoch in range(1, EPOCHS + 1):
        judge.train()
        for rows in torch.randperm(len(images)).split(BATCH):
            caption = torch.randint(texts.shape[1], (len(rows),))
            x, y = judge.picture(images[rows]), judge.text(texts[rows, caption])
            loss = _info_nce(x @ y.T * judge.log_scale.exp().clamp(max=100), groups[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        ranks = judge.eval().retrieval(*held)
        score = sum(ranks.values()) / len(ranks)
        if score > best:
            best, best_epoch = score, epoch
            weights = {name: tensor.clone() for name, tensor in judge.state_dict().items()}
        if epoch - best_epoch >= PATIENCE:
            break
    judge.load_state_dict(weights)
    return best_epoch


def _info_nce(logits: Tensor, groups: Tensor) -> Tensor:
    """InfoNCE both ways (CLIP, Radford et al. 2021, figure 3); a group shares its target."""
    right = (groups[:, None] == groups[None, :]).to(logits.dtype)
    target = right / right.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
