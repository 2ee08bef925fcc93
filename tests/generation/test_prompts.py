"""Prompts of any length and weight: the syntax, and the embeddings beside compel's."""

import time

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType
from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from koala.checkpoints.load import load_text
from koala.errors import UserError
from koala.generation import load
from koala.generation.prompt_syntax import Fragment, parse
from koala.generation.prompts import encode, padded
from koala.text_conditioning import TextConditioner
from toy import TEXT_WIDTHS, TOKENS

LONG = "a red fox, two green apples and an owl on a table under three very old trees, noto style"
WIDTH = sum(TEXT_WIDTHS)


@pytest.fixture(scope="module")
def conditioner(toy_koala):
    return TextConditioner.from_folder(toy_koala)


def flat(prompt):
    return [[(f.text, round(f.weight, 6)) for f in part] for part in parse(prompt)]


# --- syntax ---------------------------------------------------------------------------------

UP, DOWN = 1.1, round(1 / 1.1, 6)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red fox", [[("a red fox", 1)]]),
        ("", [[]]),
        ("a (red) fox", [[("a ", 1), ("red", UP), (" fox", 1)]]),
        ("a (red:1.3) fox", [[("a ", 1), ("red", 1.3), (" fox", 1)]]),
        ("a (red: 1.30 )fox", [[("a ", 1), ("red", 1.3), ("fox", 1)]]),
        ("(a:.5) (b:2.) (c:+1)", [[("a", 0.5), (" ", 1), ("b", 2), (" c", 1)]]),
        ("[red] fox", [[("red", DOWN), (" fox", 1)]]),
        ("((a) b)", [[("a", round(1.21, 6)), (" b", UP)]]),
        ("((a:1.5) b:2)", [[("a", 3), (" b", 2)]]),
        ("[(a)]", [[("a", 1)]]),
        (r"\(a\) \[b\] \\ \x", [[(r"(a) [b] \ \x", 1)]]),
        (r"(a\):1.2)", [[("a)", 1.2)]]),
        ("a (b c", [[("a ", 1), ("b c", UP)]]),
        ("a) b] :1.3) c", [[("a) b] :1.3) c", 1)]]),
        ("[a:1.3)", [[("a:1.3)", DOWN)]]),
        ("(a]b)", [[("a]b", UP)]]),
        ("3:4, 16:9", [[("3:4, 16:9", 1)]]),
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("BREAK a  BREAK\nBREAK b BREAK", [[("a", 1)], [("b", 1)]]),
        ("(a BREAK b:1.2) c", [[("a", 1.2)], [("b", 1.2), (" c", 1)]]),
        ("BREAKFAST outBREAK break", [[("BREAKFAST outBREAK break", 1)]]),
        ("a\nb  c", [[("a\nb  c", 1)]]),
    ],
)
def test_syntax(prompt, parts):
    assert flat(prompt) == parts


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
def test_escaped_text_is_itself(text):
    escaped = "".join("\\" + c if c in "()[]\\" else c for c in text.replace("BREAK", ""))
    (part,) = parse(escaped)
    assert "".join(f.text for f in part) == text.replace("BREAK", "")
    assert all(f == Fragment(f.text, 1.0) for f in part)


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.text(alphabet="()[]:1.5 aB\\", max_size=40))
def test_whatever_stands_there_is_read_or_refused(text):
    try:
        parts = parse(text)
    except UserError:
        with pytest.raises(UserError, match="allowed are weights from 0 to 10"):
            parse(text)
    else:
        assert parts and all(0 <= f.weight <= 10 and f.text for part in parts for f in part)


@pytest.mark.parametrize("prompt", ["[a" * 5000, "[a" * 3333 + "]" * 3333, "a" + 9998 * " " + "b"])
def test_no_prompt_takes_long_to_read(prompt):
    """The longest that is allowed, built to be slow: work must grow with length alone."""
    took = []
    for _ in range(3):  # a collection of garbage may fall into one
        start = time.thread_time()
        (part,) = parse(prompt)
        took.append(time.thread_time() - start)
    assert min(took) < 0.5
    letters = "".join(f.text for f in part)
    assert letters.replace(" ", "") == prompt.translate({ord(c): None for c in "[] "})
    if prompt[0] == "[":
        assert part[0].weight == pytest.approx(1 / 1.1) and part[-1].weight < 1e-100


@pytest.mark.parametrize("prompt", ["(a:11)", "(a:-1)", "((a:5):5)", "(" * 25 + "a"])
def test_weights_have_bounds(prompt):
    with pytest.raises(UserError, match=r"'a' the weight .*: allowed are weights from 0 to 10"):
        parse(prompt)


# --- embeddings -----------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a red fox", "", "x" * 30, "zwei Äpfel", r"\(a\)"])
def test_a_plain_prompt_that_fits_has_the_embedding_of_training(conditioner, prompt):
    text, pooled = conditioner([prompt.replace("\\", "")])
    ours = encode(conditioner, prompt)
    assert torch.equal(ours.text, text) and torch.equal(ours.pooled, pooled)


def compel_of(toy_koala, mode):
    tokenizer, tokenizer_2, text_encoder, text_encoder_2 = load_text(toy_koala)
    return Compel(
        [tokenizer, tokenizer_2],
        [text_encoder, text_encoder_2],
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=[False, True],
        truncate_long_prompts=False,
        split_long_text_mode=mode,
    )


@pytest.mark.parametrize(
    ("ours", "compels"),
    [
        ("a red fox", "a red fox"),
        (LONG, LONG),
        ("x" * 100, "x" * 100),  # no words to part it at
        ("a (red:1.3) fox", "a (red)1.3 fox"),
        ("(a red fox:2) and an owl", "(a red fox)2 and an owl"),
        (f"(noto:1.5) {LONG} (old:1.2)", f"(noto)1.5 {LONG} (old)1.2"),
    ],
)
def test_embeddings_equal_compels(toy_koala, conditioner, ours, compels):
    """compel parts long prompts at the ends of words too, when it is asked to."""
    theirs, pooled = compel_of(toy_koala, SplitLongTextMode.WORDS)(compels)
    encoded = encode(conditioner, ours)
    torch.testing.assert_close(encoded.text, theirs, atol=1e-5, rtol=0)
    if ours == "a red fox":  # compel pools the text with its brackets, and its first 30 tokens
        torch.testing.assert_close(encoded.pooled, pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 1.0, 1.7])
def test_weights_below_one_move_as_compels_base_embedding_does(toy_koala, conditioner, weight):
    """There compel mixes in a prompt without the words; its base embedding is the plain rule."""
    columns = []
    for i, fragments in enumerate([["two", "green", "apples"]] * 2):
        tokenizer, encoder = load_text(toy_koala)[i], load_text(toy_koala)[2 + i]
        provider = EmbeddingsProvider(
            tokenizer, encoder, truncate=False,
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        )  # fmt: skip
        with torch.no_grad():
            tokens = provider.get_token_ids_and_expand_weights(fragments, [1, weight, 1], "cpu")
            columns.append(provider.build_weighted_embedding_tensor(*tokens))
    ours = encode(conditioner, f"two (green:{weight}) apples")
    torch.testing.assert_close(ours.text, torch.cat(columns, dim=-1), atol=1e-5, rtol=0)


def test_nothing_of_a_long_prompt_is_lost(conditioner):
    """Every chunk is the prompt of its own words, and the first gives the pooled embedding."""
    chunks = ["a red fox, two green apples", "strawberries pomegranate", "blueberries"]
    whole = encode(conditioner, " ".join(chunks))
    alone = [encode(conditioner, chunk) for chunk in chunks]
    assert whole.text.shape == (1, 3 * TOKENS, WIDTH)
    assert torch.equal(whole.text, torch.cat([one.text for one in alone], dim=1))
    assert torch.equal(whole.pooled, alone[0].pooled)


def test_break_begins_a_new_chunk(conditioner):
    a, b = encode(conditioner, "a fox"), encode(conditioner, "an owl")
    both = encode(conditioner, "a fox BREAK an owl")
    assert torch.equal(both.text, torch.cat([a.text, b.text], dim=1))


def test_padding_is_the_empty_prompt(conditioner):
    one, empty = encode(conditioner, "a fox"), encode(conditioner, "")
    longer = padded(conditioner, one, 3 * TOKENS)
    assert torch.equal(longer.text, torch.cat([one.text, empty.text, empty.text], dim=1))
    assert torch.equal(padded(conditioner, one, TOKENS).text, one.text)


def test_encoding_leaves_what_is_remembered_alone(conditioner):
    before = encode(conditioner, "two green apples").text.clone()
    encode(conditioner, "two (green:1.9) apples")
    assert torch.equal(encode(conditioner, "two green apples").text, before)


# --- pictures -------------------------------------------------------------------------------


def test_cond_and_uncond_are_of_one_length(toy_koala):
    pipe = load(toy_koala, device="cpu")
    cases = ((LONG, "", 3), (LONG, "blur", 3), ("a", LONG, 3), ("a", "", 1))
    for prompt, negative, chunks in cases:
        (request,) = pipe.requests(prompt, negative_prompt=negative)
        row = pipe.begin(request)
        assert row.condition.text.shape == (1, chunks * TOKENS, WIDTH)
        assert row.unconditional.text.shape == row.condition.text.shape
        assert bool(row.unconditional.text.any()) == bool(negative)
    assert row.shape == (4, 8, 8, TOKENS)


def test_long_words_and_weights_are_seen_in_the_image(toy_koala):
    pipe = load(toy_koala, device="cpu")
    prompts = [LONG, LONG + " at night", "a (fox:1.5)", "a fox", "(a fox:1.0)"]
    drawn = [pipe(prompt, seed=1, steps=2).images[0].tobytes() for prompt in prompts]
    assert len(set(drawn)) == 4 and drawn[3] == drawn[4]


@hypothesis_settings(max_examples=20, deadline=None)
@given(st.text(alphabet="ab ()[]:1.\\BREAK,é狐\n", max_size=200))
def test_any_text_has_an_embedding_of_whole_chunks(conditioner, text):
    try:
        encoded = encode(conditioner, text)
    except UserError:
        return
    assert encoded.text.shape[1] % TOKENS == 0 and encoded.text.isfinite().all()
    assert encoded.pooled.shape == (1, TEXT_WIDTHS[1])
