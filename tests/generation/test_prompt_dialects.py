"""What other programs read in prompts: refused, or said to be words; never misread in silence."""

import contextlib
import time

import pytest

from koala.errors import UserError
from koala.generation.prompt_dialects import notes, refuse


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a cat AND_PERP a dog", "AUTOMATIC1111"),
        ("a cat ADDCOL a dog", "regions"),
        ("COUPLE(0 0.5) a dog", "regions"),
        ("a ${colour=red} cat", "dynamic prompts"),
        ('("a cat", "a dog").and()', "InvokeAI and compel"),
        ('("a cat", "a dog").blend(0.7, 0.3)', "InvokeAI and compel"),
        ("a cat.swap(dog) on a mat", "InvokeAI and compel"),
        ("(a cat)1.3 on a mat", "InvokeAI and compel"),
        ("(a cat)++, a mat", "InvokeAI and compel"),
        ("(a cat)-", "InvokeAI and compel"),
        ("(cat:1,3)", r"has no weight that can be read: a weight is written \(cat:1\.3\)"),
        ("(cat: 80%)", "has no weight that can be read"),
        ("(cat:\u22121)", "has no weight that can be read"),
        ("(cat:1.3.2)", "has no weight that can be read"),
        ("1.3::a cat::, a mat", "NovelAI"),
        ("a cat::2 a dog::1", "Midjourney"),
        ("a cat --ar 16:9", "Midjourney's: options of koala's stand outside"),
        ("a cat \u2014no dogs", "Midjourney's"),
        ("/imagine prompt: a cat", "Midjourney's bot"),
        ("a cat <|endoftext|> a dog", "stands around every prompt"),
    ],
)
def test_what_has_another_meaning_elsewhere_is_refused(prompt, told):
    with pytest.raises(UserError, match=told) as caught:
        refuse(prompt)
    assert "\n" not in str(caught.value) and not notes("a cat on a mat")


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("{{masterpiece}}, a cat", "'{masterpiece}', which is words here, brackets too"),
        ("a cat++ on a mat", "'cat++', which is words here"),
        ("a cat <lora:ink", "'<lora:ink', which is words here; a LoRA is written <lora:NAME:0.8>"),
        ("a <zork> cat", "'<zork>', which is words here; a textual inversion is given"),
        ("\uff08cat\uff1a1.3\uff09", "which is words here, brackets too; a weight is written"),
        ("a (cat:1.3", "'(cat:1.3', which is not closed"),
        ("a cat\nNegative prompt: dogs", "'Negative prompt:', which is words here"),
        ("a cat\nSteps: 20, Sampler: Euler a", "'Steps: 20, Sampler:', which is words here"),
        ("# mine\na cat", "'# mine', which is words here"),
        ("(cat:dog:0.5)", "which is a weight here; a change is written [cat:dog:0.5]"),
    ],
)
def test_what_may_be_words_is_drawn_and_said(prompt, told):
    refuse(prompt)
    (line,) = notes(prompt)
    assert told in line and "\n" not in line


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat, (red:1.2) [hat:0.5] [cat::0.5] [a|b]",
        r"\(cat\)2, a \(cat\)++ ",
        "well-known sci-fi, 16:9, 3:4, A+, 18+ - a cat -- on a mat",
        "a (blue)-eyed cat (1990s) - oil on canvas",
        "candy and hANDle, a < b > c, no.5, score_9, 1girl",
        "the ratio 2:1; C: a note, e.g. this",
        "(a cat:1.3), (a dog), ((a mat)) | a hat",
    ],
)
def test_plain_prompts_are_left_alone(prompt):
    refuse(prompt)
    assert notes(prompt) == []


@pytest.mark.parametrize("part", ["(", "(a:", "{", "[a", "<", "a:", "+", "--", "__", "(a)", ": "])
def test_no_prompt_takes_long_to_read(part):
    prompt = part * (10_000 // len(part))
    start = time.thread_time()
    notes(prompt)
    with contextlib.suppress(UserError):
        refuse(prompt)
    assert time.thread_time() - start < 3
