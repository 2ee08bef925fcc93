"""Text embeddings and time ids: equal to diffusers' own, bounded memo, honest about cut words."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from koala.checkpoints.load import load_text
from koala.errors import UserError
from koala.text_conditioning import TextConditioner, time_ids
from toy import TEXT_WIDTHS, TOKENS, toy_pipeline

PROMPTS = ["a red fox", "zwei grüne Äpfel", "word " * 40, ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture
def conditioner(folder):
    return TextConditioner.from_folder(folder)


def test_embeddings_are_those_of_diffusers_pipeline(folder, conditioner):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    text, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    ours, ours_pooled = conditioner(PROMPTS)
    assert ours.shape == (4, TOKENS, sum(TEXT_WIDTHS)) and ours_pooled.shape == (4, TEXT_WIDTHS[1])
    torch.testing.assert_close(ours, text, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours_pooled, pooled, atol=1e-5, rtol=0)


def test_zeros_are_diffusers_embedding_of_no_negative_prompt(folder, conditioner):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    _, text, _, pooled = pipe.encode_prompt(["a", "b"], do_classifier_free_guidance=True)
    zeros, zeros_pooled = conditioner.zeros(2)
    assert torch.equal(zeros, text) and torch.equal(zeros_pooled, pooled)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_an_embedding_depends_on_its_prompt_alone(folder, group):
    together = TextConditioner.from_folder(folder, group=group)(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = TextConditioner.from_folder(folder, group=group)([prompt])
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1][0], together[1][i])


def test_memo_gives_the_same_forgets_the_oldest_and_is_never_handed_out(folder):
    conditioner = TextConditioner(*load_text(folder, torch.float32), cache_size=2)
    first, _ = conditioner(["a"])
    kept = first.clone()
    first.zero_()
    assert torch.equal(conditioner(["a"])[0], kept)
    conditioner(["b", "a", "c"])
    assert list(conditioner._cache) == [conditioner._first_ids(prompt) for prompt in ("a", "c")]
    assert torch.equal(conditioner(["b", "a", "b"])[0][1], kept[0])


def test_without_a_memo_prompts_are_encoded_together(folder, conditioner):
    together = TextConditioner(*load_text(folder, torch.float32), cache_size=0)
    for ours, alone in zip(together(PROMPTS), conditioner(PROMPTS), strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=0)
    assert not together._cache


def test_embeddings_made_while_generating_can_be_trained_on(conditioner):
    with torch.inference_mode():
        conditioner(["a"])
    layer = torch.nn.Linear(sum(TEXT_WIDTHS), 1)
    layer(conditioner(["a"])[0]).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert not conditioner(["a"])[0].requires_grad


def test_no_prompts_give_no_rows(conditioner):
    text, pooled = conditioner([])
    assert text.shape == (0, TOKENS, sum(TEXT_WIDTHS)) and pooled.shape == (0, TEXT_WIDTHS[1])


def test_time_ids_are_diffusers_add_time_ids(folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    theirs = pipe._get_add_time_ids((48, 64), (3, 5), (32, 40), torch.float32, TEXT_WIDTHS[1])
    ours = time_ids([(48, 64)] * 2, [(3, 5)] * 2, [(32, 40)] * 2)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs.expand(2, 6))
    assert time_ids([], [], []).shape == (0, 6)


def test_tokenizers_of_unequal_length_are_refused(folder):
    parts = load_text(folder, torch.float32)
    parts[1].model_max_length = 77
    with pytest.raises(UserError, match=r"truncate at 32 and 77 tokens.*32 positions"):
        TextConditioner(*parts)
