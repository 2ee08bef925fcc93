"""Every metric by its name: what it needs, which way is better, and who published it.

The class that computes it lies in the module `home`. Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from koala.errors import UserError, unknown
from koala.evaluation.metrics.weights import WEIGHTS
from koala.utils.extras import require


@dataclass(frozen=True)
class MetricInfo:
    """What is known of a metric before it is computed.

    home: its class, as "module:Class" in this package. scores: what `Metric.score` computes; of
    metrics that name the same, one computes it for all. models: names in `weights.WEIGHTS`. facts:
    what its prompts must tell. real: whether it compares with real pictures.
    """

    name: str
    title: str  # of the table's column
    higher: bool  # is better
    bounds: tuple[float | None, float | None]
    source: str
    home: str
    scores: str
    models: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    real: bool = False
    packages: tuple[str, ...] = ()
    factor: float = 1  # of the value in tables
    digits: int = 3
    options: dict[str, Any] = field(default_factory=dict)  # of the class

    @property
    def column(self) -> str:
        """The title with an arrow to the better side."""
        return f"{self.title} {'↑' if self.higher else '↓'}"


def _retrieval(rank: int) -> MetricInfo:
    return MetricInfo(
        f"r@{rank}", f"R@{rank}", True, (0, 1), "koala.evaluation.retrieval",
        "bundled:Retrieval", "efflite0", packages=("efficientnet_lite_pytorch",),
        options={"rank": rank},
    )  # fmt: skip


_ALL = (
    MetricInfo(
        "fd-efflite0", "FD-EffLite0", False, (0, None), "Heusel et al. 2017, on EfficientNet-Lite0",
        "bundled:EffLite0Distance", "efflite0", real=True,
        packages=("efficientnet_lite_pytorch",), digits=2,
    ),
    MetricInfo(
        "kd-efflite0", "kernel distance x1000", False, (None, None),
        "Binkowski et al. 2018, on EfficientNet-Lite0", "bundled:EffLite0Kernel", "efflite0",
        real=True, packages=("efficientnet_lite_pytorch",), factor=1000, digits=2,
    ),
    *(_retrieval(rank) for rank in (1, 5, 10)),
    MetricInfo(
        "hpsv2.1", "HPSv2.1", True, (-100, 100), "Wu et al. 2023 (arXiv 2306.09341)",
        "clip:HPSv2", "hpsv2.1", models=("hpsv2.1",), digits=2,
    ),
    MetricInfo(
        "clip-score", "CLIP score", True, (0, 100), "Hessel et al. 2021 (arXiv 2104.08718)",
        "clip:ClipScore", "clip-score", models=("clip-vit-large-patch14",), digits=2,
    ),
    MetricInfo(
        "pickscore", "PickScore", True, (-100, 100), "Kirstain et al. 2023 (arXiv 2305.01569)",
        "clip:PickScore", "pickscore", models=("pickscore",), digits=2,
    ),
    MetricInfo(
        "imagereward", "ImageReward", True, (None, None), "Xu et al. 2023 (arXiv 2304.05977)",
        "image_reward:ImageReward", "imagereward", models=("imagereward", "bert-vocabulary"),
    ),
    MetricInfo(
        "aesthetic", "aesthetic", True, (None, None),
        "Schuhmann 2022, improved-aesthetic-predictor",
        "clip:Aesthetic", "aesthetic", models=("clip-vit-large-patch14", "aesthetic"), digits=2,
    ),
    MetricInfo(
        "fid", "FID", False, (0, None), "Heusel et al. 2017 (arXiv 1706.08500)",
        "distances:InceptionFrechet", "inception", models=("inception",), real=True,
        packages=("torch_fidelity",), digits=2,
    ),
    MetricInfo(
        "kid", "KID x1000", False, (None, None), "Binkowski et al. 2018 (arXiv 1801.01401)",
        "distances:InceptionKernel", "inception", models=("inception",), real=True,
        packages=("torch_fidelity",), factor=1000, digits=2,
    ),
    MetricInfo(
        "cmmd", "CMMD", False, (0, None), "Jayasumana et al. 2024 (arXiv 2401.09603)",
        "distances:Cmmd", "clip-vit-large-patch14-336", models=("clip-vit-large-patch14-336",),
        real=True,
    ),
    MetricInfo(
        "fd-dinov2", "FD-DINOv2", False, (0, None), "Stein et al. 2023 (arXiv 2306.04675)",
        "distances:DinoFrechet", "dinov2", models=("dinov2",), real=True, digits=2,
    ),
    MetricInfo(
        "compbench", "T2I-CompBench", True, (0, 1), "Huang et al. 2023 (arXiv 2307.06350)",
        "compbench:CompBench", "compbench",
        models=("blip-vqa", "clip-vit-base-patch32", "owlv2"), facts=("relation",),
        packages=("spacy",), digits=4,
    ),
    MetricInfo(
        "blip-vqa", "BLIP-VQA", True, (0, 1), "Huang et al. 2023 (arXiv 2307.06350)",
        "compbench:BlipVqa", "blip-vqa", models=("blip-vqa",), facts=("phrases",), digits=4,
    ),
    MetricInfo(
        "geneval", "GenEval", True, (0, 1), "Ghosh et al. 2023 (arXiv 2310.11513)",
        "geneval:GenEval", "geneval", models=("mask2former", "clip-vit-large-patch14"),
        facts=("include",), packages=("scipy",),
    ),
    MetricInfo(
        "dpg", "DPG-Bench", True, (0, 100), "Hu et al. 2024 (arXiv 2403.05135)",
        "questions:Dpg", "dpg", models=("blip-vqa",), facts=("propositions",), digits=2,
    ),
    MetricInfo(
        "soft-tifa-gm", "Soft-TIFA GM", True, (0, 100), "Kamath et al. 2025 (arXiv 2512.16853)",
        "questions:SoftTifa", "soft-tifa", models=("vlm",), facts=("questions",), digits=1,
        options={"geometric": True},
    ),
    MetricInfo(
        "soft-tifa-am", "Soft-TIFA AM", True, (0, 100), "Kamath et al. 2025 (arXiv 2512.16853)",
        "questions:SoftTifa", "soft-tifa", models=("vlm",), facts=("questions",), digits=1,
        options={"geometric": False},
    ),
)  # fmt: skip
METRICS: dict[str, MetricInfo] = {info.name: info for info in _ALL}
OFFLINE = ("fd-efflite0", "kd-efflite0", "r@1", "r@5", "r@10")  # their weights come in packages


def infos(names: Sequence[str]) -> list[MetricInfo]:
    """The metrics of these names, once each. UserError for one that is not known."""
    found = {}
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        found[name] = METRICS[name]
    return [*found.values()]


def check_packages(metric: MetricInfo) -> None:
    """UserError unless the packages that the metric needs are installed."""
    extra = "evaluate" if metric.name in OFFLINE else "metrics"
    require(f"the metric {metric.name}", extra, *metric.packages)


def weights_of(metrics: Sequence[MetricInfo], given: Sequence[str]) -> dict[str, str]:
    """NAME=PATH of `--weights` as a mapping. UserError for what no metric of these needs."""
    wanted = list(dict.fromkeys(model for metric in metrics for model in metric.models))
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UserError(f"--weights {text}: write NAME=PATH, such as hpsv2.1=HPS_v2.1.pt")
        if name not in WEIGHTS:
            raise unknown("weights", name, WEIGHTS)
        if name not in wanted:
            raise UserError(
                f"--weights {name}: no chosen metric needs them ({', '.join(wanted) or 'none'})"
            )
        found[name] = path
    return found
