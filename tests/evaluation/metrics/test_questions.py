"""Metrics that ask BLIP and detectors, against transformers' own results and rules told by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    Owlv2ForObjectDetection,
)

from koala.errors import UserError
from koala.evaluation.metrics.answers import Blip
from koala.evaluation.metrics.boxes import Found, overlap, placed, relations
from koala.evaluation.metrics.catalogue import METRICS
from koala.evaluation.metrics.compbench import CompBench
from koala.evaluation.metrics.geneval import GenEval
from koala.evaluation.metrics.metric import create
from koala.evaluation.metrics.questions import share, spellings
from koala.evaluation.prompts import Prompt
from toy_metrics import random_pictures, toy_blip, toy_clip, toy_mask2former, toy_owl

CPU = torch.device("cpu")
QUESTIONS = ["is there a fox?", "an owl?", "red?"]
CLASSES = ["fox", "owl", "mouse"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    clip = toy_clip(folder / "clip")
    return {
        "blip-vqa": toy_blip(folder / "blip"),
        "clip-vit-base-patch32": clip,
        "clip-vit-large-patch14": clip,
        "owlv2": toy_owl(folder / "owl"),
        "mask2former": toy_mask2former(folder / "mask2former", CLASSES),
    }


@torch.no_grad()
def yes_of_transformers(folder) -> torch.Tensor:
    """P(yes) / (P(yes) + P(no)) of the first token that transformers' model generates."""
    model = BlipForQuestionAnswering.from_pretrained(folder)
    tokenizer = BertTokenizer.from_pretrained(folder)
    prepare = BlipImageProcessorPil.from_pretrained(folder)
    found = []
    for picture, question in zip(random_pictures(3), QUESTIONS, strict=True):
        asked = tokenizer(question, return_tensors="pt")
        asked["input_ids"][:, 0] = tokenizer.vocab["[ENC]"]  # as the model was trained
        scores = model.generate(
            **prepare(picture, return_tensors="pt"), input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"], max_new_tokens=1, output_scores=True,
            return_dict_in_generate=True,
        ).scores[0][0]  # fmt: skip
        chances = scores.softmax(-1)
        yes, no = (chances[tokenizer.vocab[word]] for word in ("yes", "no"))
        found.append(yes / (yes + no))
    return torch.stack(found)


@torch.inference_mode()
def test_blip_says_yes_as_often_as_transformers_does(weights):
    wanted = yes_of_transformers(weights["blip-vqa"])
    found = Blip(weights["blip-vqa"], CPU).yes(random_pictures(3), QUESTIONS)
    assert wanted.std() > 1e-2
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_blip_vqa_is_the_product_over_phrases(weights):
    metric = create(METRICS["blip-vqa"])
    metric.prepare(weights, CPU)
    pictures = random_pictures(2)
    prompts = [
        Prompt("0", "", "", {"phrases": ["a red fox", "an owl"]}),
        Prompt("1", "", "", {"phrases": []}),
    ]
    found = metric.score(pictures, prompts)[:, 0]
    each = Blip(weights["blip-vqa"], CPU).yes([pictures[0]] * 2, ["a red fox?", "an owl?"])
    torch.testing.assert_close(found, torch.stack([each.prod(), torch.tensor(1.0)]))


def test_a_proposition_counts_only_if_what_it_builds_on_holds():
    tree = [
        {"number": 1, "after": []}, {"number": 2, "after": [1]}, {"number": 3, "after": [1, 2]},
        {"number": 4, "after": []},
    ]  # fmt: skip
    assert share(tree, [True, True, True, True]) == 1
    assert share(tree, [False, True, True, True]) == 0.25 + 0.0
    assert share(tree, [True, False, True, True]) == 0.5


@torch.inference_mode()
def test_dpg_is_the_share_of_blips_yes(weights):
    metric = create(METRICS["dpg"])
    metric.prepare(weights, CPU)
    asked = [{"number": i, "question": q, "after": []} for i, q in enumerate(QUESTIONS)]
    pictures = random_pictures(4)
    prompts = [Prompt(str(i), "", "", {"propositions": asked}) for i in range(4)]
    found = metric.score(pictures, prompts)[:, 0]
    yes = [metric.model.yes([p] * 3, QUESTIONS) > 0.5 for p in pictures]
    torch.testing.assert_close(found, 100 * torch.stack(yes).float().mean(1))


def test_right_answers_are_spelt_in_several_ways():
    assert spellings("How many foxes are there?", "two") == [
        "two", "Two", "2", "2", " two", " Two", " 2", " 2",
    ]  # fmt: skip
    assert spellings("Is it red?", "Yes") == ["yes", "Yes", " yes", " Yes"]


def box(name: str, left: float, top: float, side: float = 10, score: float = 0.9) -> Found:
    return Found(name, score, (left, top, left + side, top + side))


def test_places_are_told_by_centres_and_overlap():
    a, far_right, below = box("a", 0, 0), box("b", 300, 5), box("c", 0, 40)
    assert relations(a, far_right) == {"left of"} and relations(far_right, a) == {"right of"}
    assert relations(a, below) == {"above"} and relations(below, a) == {"below"}
    assert relations(a, box("d", 1, 1)) == set()
    assert relations(a, box("e", 100, 100)) == {"left of", "above"}
    assert overlap(a.box, box("x", 5, 0).box) == pytest.approx(50 / 150)
    assert placed("left", a, far_right) == placed("top", a, below) == 1
    assert placed("right", a, far_right) == placed("bottom", a, below) == 0
    assert placed("left", a, box("x", 5, 0)) == pytest.approx(0.1 * 3)
    assert placed("left", a, box("x", 50, 80)) == 0, "more below than beside"
    assert placed("next to", a, far_right) == 1, "within 150 pixels one way"
    assert placed("next to", a, box("x", 300, 200)) == pytest.approx(0.5)
    assert placed("next to", a, box("x", 300, 200), scale=0.5) == 1


@torch.inference_mode()
def test_geneval_detects_what_transformers_does(weights):
    metric = create(METRICS["geneval"])
    assert isinstance(metric, GenEval)
    metric.prepare(weights, CPU)
    picture = random_pictures(1, (64, 96))[0]
    folder = weights["mask2former"]
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder)
    prepare = Mask2FormerImageProcessorPil.from_pretrained(folder)
    wanted = prepare.post_process_instance_segmentation(
        model(**prepare([picture], return_tensors="pt")), threshold=0.3, target_sizes=[(96, 64)]
    )[0]["segments_info"]
    found = metric.detect(picture, "colors")
    things = sorted((one.score, one.name) for every in found.values() for one in every)
    told = sorted((segment["score"], CLASSES[segment["label_id"]]) for segment in wanted)
    assert [name for _, name in things] == [name for _, name in told]
    assert [score for score, _ in things] == pytest.approx([score for score, _ in told], abs=1e-4)
    asked = ([], [{"class": "zebra", "count": 1}])
    prompts = [Prompt("0", "", "colors", {"include": include}) for include in asked]
    score = metric.score([picture] * 2, prompts)
    assert score.tolist() == [[1.0], [0.0]]


@torch.inference_mode()
def test_geneval_asks_for_numbers_colours_and_places(weights):
    metric = create(METRICS["geneval"])
    assert isinstance(metric, GenEval)
    metric.prepare(weights, CPU)
    picture = Image.new("RGB", (200, 100), "white")
    picture.paste((200, 0, 0), (10, 10, 40, 40))
    red = np.zeros((100, 200), bool)
    red[10:40, 10:40] = True
    fox = Found("fox", 0.9, (10, 10, 40, 40), red)
    found = {
        "fox": [fox],
        "owl": [box("owl", 150, 10, 30), box("owl", 100, 60, 30, 0.5)],
        "mouse": [],
    }

    def shows(include, exclude=()):
        return metric.shows(picture, {"include": include, "exclude": exclude}, found)

    assert shows([{"class": "owl", "count": 2}])
    assert not shows([{"class": "owl", "count": 3}])
    assert not shows([{"class": "owl", "count": 1}], [{"class": "owl", "count": 2}])
    assert not shows([{"class": "computer mouse", "count": 1}])
    found["mouse"] = [box("mouse", 0, 0)]
    assert shows([{"class": "computer mouse", "count": 1}])
    right = {"class": "owl", "count": 1, "position": ["right of", 0]}
    assert shows([{"class": "fox", "count": 1}, right])
    assert not shows([{"class": "fox", "count": 2}, right]), "the thing that it is right of lacks"
    left = {**right, "position": ["left of", 0]}
    assert not shows([{"class": "fox", "count": 1}, left])
    colour = metric.colours(picture, [fox], "fox")[0]
    assert shows([{"class": "fox", "count": 1, "color": colour}])
    other = next(c for c in ("red", "blue") if c != colour)
    assert not shows([{"class": "fox", "count": 1, "color": other}])
    cut = Image.composite(picture, Image.new("RGB", (200, 100), (0x99,) * 3), Image.fromarray(red))
    with torch.no_grad():
        texts = [f"a photo of a {colour}{of}" for of in (" fox", "-colored fox", " object")]
        every = metric._colours("fox") @ metric.clip.pictures([cut.crop((10, 10, 40, 40))])[0]
        own = metric.clip.texts(texts).mean(0)
    assert float(every.max()) == pytest.approx(
        float(own / own.norm() @ metric.clip.pictures([cut.crop((10, 10, 40, 40))])[0]), abs=1e-5
    )


class Word:
    def __init__(self, text: str) -> None:
        self.text = text
        self.pos_ = {"fox": "NOUN", "owl": "NOUN", "red": "ADJ", "girl": "NOUN"}.get(text, "X")


class Grammar(list):
    """What spaCy says of the toy sentences: words with their kinds, and noun phrases."""

    def __init__(self, text: str) -> None:
        super().__init__(map(Word, text.split()))
        phrases = [p for p in ("a red fox", "a fox", "an owl", "the left") if p in text]
        self.noun_chunks = [type("Chunk", (), {"text": phrase}) for phrase in phrases]


class Spoken(CompBench):
    def language_model(self):
        return Grammar


@torch.inference_mode()
def test_compbench_measures_each_category_its_own_way(weights):
    metric = Spoken(METRICS["compbench"])
    metric.prepare(weights, CPU)
    picture = random_pictures(1)[0]

    def score(text: str, category: str, relation: str) -> float:
        return float(metric.score([picture], [Prompt("0", text, category, {"relation": relation})]))

    yes = metric.blip.yes([picture] * 2, ["a red fox?", "an owl?"]).prod()
    text = "a red fox on the left of an owl"
    attribute = score(text, "color", "color")
    assert attribute == pytest.approx(float(yes), abs=1e-6)
    action = score("a fox and an owl", "non_spatial", "non_spatial")
    assert action == pytest.approx(float(metric.clip.similarity([picture], ["a fox and an owl"])))
    spatial = score(text, "spatial", "spatial")
    assert score(text, "complex", "spatial") == pytest.approx((attribute + spatial) / 2)
    plain = float(metric.clip.similarity([picture], ["a fox on the left of an owl"]))
    both = score(text, "complex", "both")
    assert both == pytest.approx((attribute + spatial + plain) / 3, abs=1e-6)
    assert score("a fox", "spatial", "spatial") == 0, "no relation is told"


@torch.inference_mode()
def test_the_surest_box_is_transformers(weights):
    metric = Spoken(METRICS["compbench"])
    metric.prepare(weights, CPU)
    picture = random_pictures(1, (60, 40))[0]
    found = metric.best(picture, "fox")
    model = Owlv2ForObjectDetection.from_pretrained(weights["owlv2"])
    text = metric.words(["a photo of a fox"], return_tensors="pt")
    pixels = metric.pictures([picture], return_tensors="pt")
    outputs = model(**text, **pixels)
    told = metric.pictures.post_process_object_detection(
        outputs, threshold=0.0, target_sizes=[(60, 60)]
    )[0]
    best = int(told["scores"].argmax())
    assert found is not None and found.score == pytest.approx(float(told["scores"][best]), abs=1e-4)
    assert found.box == pytest.approx(told["boxes"][best].tolist(), abs=1e-2)


def test_spacys_model_is_asked_for(weights):
    pytest.importorskip("spacy")
    metric = create(METRICS["compbench"])
    assert isinstance(metric, CompBench)
    with pytest.raises(UserError, match="python -m spacy download"):
        metric.language_model()
