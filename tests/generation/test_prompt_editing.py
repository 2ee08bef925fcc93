"""Prompts that change from step to step, and LoRAs that they name."""

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from koala.cli import main
from koala.errors import UserError
from koala.generation import load, read_settings
from koala.generation.denoise import evaluate
from koala.generation.prompt_editing import by_step
from koala.generation.prompt_loras import refuse_loras, shared_loras, split_loras
from toy import toy_unet
from toy_lora import toy_base, toy_lora


@pytest.fixture(scope="module")
def pipeline(toy_sdxl):
    return load(toy_sdxl, "cpu")


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> Path:
    folder, base = tmp_path_factory.mktemp("loras"), toy_base(toy_unet("sdxl"))
    toy_lora(folder / "ink.safetensors", base, seed=1, alpha=8)
    toy_lora(folder / "my style.safetensors", base, seed=2, alpha=8)
    return folder


# --- the syntax, as in AUTOMATIC1111's -------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a cat", ["a cat"] * 4),
        ("a [cat:dog:0.5]!", ["a cat!", "a cat!", "a dog!", "a dog!"]),
        ("a [cat:dog:1]!", ["a cat!", "a dog!", "a dog!", "a dog!"]),
        ("a [cat:dog:1.0]", ["a cat"] * 4),
        ("[cat:dog:0]", ["dog"] * 4),
        ("[cat:dog:.7]", ["cat", "cat", "dog", "dog"]),  # 2.8 steps: rounded down
        ("a [red :0.5]fox", ["a fox", "a fox", "a red fox", "a red fox"]),
        ("a [red ::1]fox", ["a red fox", "a fox", "a fox", "a fox"]),
        ("[cow|horse] in a field", [f"{one} in a field" for one in ("cow", "horse") * 2]),
        ("[a|b|c]", ["a", "b", "c", "a"]),
        ("[a|]b", ["ab", "b", "ab", "b"]),
        ("[[a|b]:c:2]", ["a", "b", "c", "c"]),
        ("[a:[b:c:3]:1]", ["a", "b", "b", "c"]),
        ("[(cat:1.3):(dog:0.7):2]", ["(cat:1.3)", "(cat:1.3)", "(dog:0.7)", "(dog:0.7)"]),
        ("(a [b:c:2]:1.2)", ["(a b:1.2)", "(a b:1.2)", "(a c:1.2)", "(a c:1.2)"]),
        # Weights and text stay.
        ("[word] (other:1.2)", ["[word] (other:1.2)"] * 4),
        ("[note: warm light]", ["[note: warm light]"] * 4),
        (r"\[a|b\] \[a:b:0.5\]", [r"\[a|b\] \[a:b:0.5\]"] * 4),
        (r"[a\:b:c:2]", [r"a\:b", r"a\:b", "c", "c"]),
        ("a | b, 16:9 [x", ["a | b, 16:9 [x"] * 4),
        ("candy and hANDle", ["candy and hANDle"] * 4),
        ("a {set} of snake__case", ["a {set} of snake__case"] * 4),
    ],
)
def test_the_prompt_of_each_step(prompt, texts):
    assert by_step(prompt, 4) == texts


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a cat AND a dog", "the prompt has AND, .* separate them by commas"),
        ("a cat AND a dog :1.2", "the prompt has AND"),
        ("a {red|blue} fox", r"has \{red\|blue\}, which chooses between words in dynamic prompts"),
        ("a __colour__ fox", "has __colour__, which stands for a list of words"),
        ("a fox, embedding:zork", "has embedding:zork, which is ComfyUI's"),
        ("[cat:dog:half]", r"\[cat:dog:half\] in the prompt is no change that is known: allowed"),
        ("[a:b:c:0.5]", "no change that is known"),
        ("[a|b:0.5]", "no change that is known"),
        ("[a:b:-1]", "no change that is known"),
        ("[word:1.3]", r"shares up to 1\.0 .*a weight is written \(word:1\.3\)"),
        ("[cat:dog:5]", r"changes at step 5, but 4 are done"),
        ("[a:" * 30 + "x" + ":2]" * 30, "nested deeper than 20"),
    ],
)
def test_what_would_be_drawn_as_words_is_refused(prompt, told):
    with pytest.raises(UserError, match=told) as caught:
        by_step(prompt, 4)
    assert "\n" not in str(caught.value)


def test_changes_have_a_limit():
    turns = "".join("[" + "|".join(map(str, range(n))) + "]" for n in (7, 9, 11))
    with pytest.raises(UserError, match="into 100 different ones over the steps: allowed are 64"):
        by_step(turns, 100)
    assert len(by_step(turns, 60)) == 60


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.text(alphabet="()[]:|1.5 aB\\", max_size=40))
def test_whatever_stands_there_is_read_or_refused(text):
    try:
        found = by_step(text, 5)
    except UserError:
        return
    assert len(found) == 5
    if "|" not in text and ":" not in text:
        assert found == [text] * 5


@pytest.mark.parametrize("prompt", ["[a:" * 3333, "[a" * 3333 + "]" * 3333, "[a:1" * 2500])
def test_no_prompt_takes_long_to_read(prompt):
    start = time.thread_time()
    assert by_step(prompt, 1000) == [prompt] * 1000
    assert time.thread_time() - start < 5


# --- drawn ----------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_change_takes_effect_at_its_step(pipeline):
    """Bit for bit: the same row, given the other prompt's condition by hand."""

    def row(prompt, negative):
        asked = {"negative_prompt": negative, "steps": 4, "seed": 1}
        return pipeline.begin(pipeline.requests(prompt, **asked)[0])

    def step(one):
        one.advance(evaluate(pipeline.predict, [one])[0])

    changing, by_hand = row("a [cat:dog:0.5]", "[red|blue]"), row("a cat", "red")
    others = {text: row(text, "blue") for text in ("a cat", "a dog")}
    for i in range(4):
        prompt = "a cat" if i < 2 else "a dog"
        by_hand.condition = others[prompt].condition
        red = row("a cat", "red").unconditional
        by_hand.unconditional = others[prompt].unconditional if i % 2 else red
        step(changing)
        step(by_hand)
        assert torch.equal(changing.x, by_hand.x)
    assert changing.finished


def test_rows_with_changes_share_passes_with_others(pipeline):
    """Also where a change makes the prompt longer than a chunk."""
    long = "a fox " * 30
    prompts = ["[cat:dog:2]", f"[cat:{long}:2]", "[a|b] field", "a cat"]
    asked = {"steps": 4, "seed": 3}
    together = pipeline(prompts, **asked).images
    for i, prompt in enumerate(prompts):
        (alone,) = pipeline(prompt, steps=4, seed=3 + i).images
        difference = torch.tensor(list(alone.tobytes())) - torch.tensor(list(together[i].tobytes()))
        assert difference.abs().max() <= 1


def test_with_strength_the_share_is_of_the_steps_that_are_done(pipeline):
    from PIL import Image

    asked = {"image": Image.new("RGB", (64, 64), "red"), "steps": 8, "strength": 0.5}
    row = pipeline.begin(pipeline.requests("[cat:dog:0.5]", **asked)[0])
    texts = [row.condition, *(condition for condition, _ in row.later)]
    assert [one is texts[0] for one in texts] == [True, True, False, False]
    with pytest.raises(UserError, match="changes at step 5, but 4 are done"):
        pipeline.requests("[cat:dog:5]", **asked)


# --- LoRAs in prompts -----------------------------------------------------------------------


def test_loras_are_taken_out_of_the_prompt(loras):
    ink, style = loras / "ink.safetensors", loras / "my style.safetensors"
    assert split_loras("a fox", None) == ("a fox", {})
    assert split_loras("a < b", None) == ("a < b", {})
    for one in ("lora", "LORA", "Lora", " lora ", "lyco"):
        found = split_loras(f"a <{one}:ink:0.5>fox <{one}:my style>", loras)
        assert found == ("a fox", {ink: 0.5, style: 1.0})
    assert shared_loras(["a <lora:ink>", "b <lora:ink:1>"], loras) == (["a", "b"], {ink: 1.0})
    different = ["a <lora:ink>", "b"]
    assert shared_loras(different, loras) == (different, {})


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("<lora:ikn:0.8>", "unknown LoRA 'ikn': choose ink, my style"),
        ("<lora:../ink>", "unknown LoRA"),
        ("<lora:ink:0,8>", "the scale '0,8' is not a number; write <lora:ink:0.8>"),
        ("<lora:ink:nan>", "LoRA scale is nan"),
        ("<lora:ink:1000>", r"LoRA scale is 1000\.0: allowed are"),
        ("<lora:ink:1:1>", "<lora:ink:1:1> is not supported: use <lora:NAME:SCALE>"),
        ("<hypernet:ink:1>", "<hypernet:ink:1> is not supported"),
        ("<loha:ink:1>", "<loha:ink:1> is not supported"),
        ("<random:red,blue>", "<random:red,blue> is not supported"),
        ("<lora:ink:1 fox", "<lora:ink:1 is not supported"),
        ("\uff1clora\uff1aink\uff1a1\uff1e", "is not supported: use <lora:NAME:SCALE>"),
        ("<lora:ink> <lora:ink:2>", "names the LoRA 'ink' twice"),
    ],
)
def test_loras_that_cannot_be_had_are_refused(loras, prompt, told):
    with pytest.raises(UserError, match=told):
        split_loras(f"a {prompt}", loras)


def test_a_lora_without_a_folder_is_not_spoken_as_words(pipeline, loras):
    with pytest.raises(UserError, match="names a LoRA, but there is no LoRA folder: give one with"):
        pipeline("a fox <lora:ink:0.8>")
    with pytest.raises(UserError, match="has no effect in the negative prompt"):
        refuse_loras("ugly <lora:ink:1>")
    with pytest.raises(UserError, match="<random:a,b> is not supported"):
        refuse_loras("ugly <random:a,b>")
    with pytest.raises(UserError, match="the prompt is empty"):
        pipeline("<lora:ink:0.8>", lora_dir=loras)


def test_each_prompt_has_the_loras_that_it_names(pipeline, loras):
    ink = loras / "ink.safetensors"
    asked = {"steps": 2, "seed": 4}
    result = pipeline(["a fox <lora:ink:0.8>", "a fox"], lora_dir=loras, **asked)
    assert [s.prompt for s in result.settings] == ["a fox"] * 2
    assert [s.loras for s in result.settings] == [(("ink", 0.8),), ()]
    (named,) = pipeline("a fox", lora={ink: 0.8}, **asked).images
    assert named.tobytes() == result.images[0].tobytes()
    (plain,) = pipeline("a fox", steps=2, seed=5).images
    assert plain.tobytes() == result.images[1].tobytes() != result.images[0].tobytes()


@pytest.mark.parametrize(
    "given",
    [["a fox", "an owl <lora:ink:0.8>"], ["a fox <lora:ink:0.8>", "an owl <lora:ink:0.8>"],
     ["a fox", "--lora", "{ink}:0.8"]],
    ids=["of one prompt", "of all", "of the model"],
)  # fmt: skip
def test_how_much_of_a_lora_fits_is_said_once(given, toy_sdxl, loras, tmp_path, capsys):
    given = [part.format(ink=loras / "ink.safetensors") for part in given]
    command = ["generate", *given, "--model", str(toy_sdxl), "--steps", "1"]
    assert main([*command, "--lora-dir", str(loras), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("modules fit") == 1


def test_generate_takes_them_also_under_a_memory_plan(toy_sdxl, loras, tmp_path, capsys):
    """There, LoRAs are merged before the weights are placed."""
    command = ["generate", "a fox <lora:ink:0.8>", "--model", str(toy_sdxl), "--device", "cpu",
               "--steps", "2", "--seed", "1", "--lora-dir", str(loras)]  # fmt: skip
    plain, planned, given = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    assert main([*command, "--out", str(plain)]) == 0
    assert main([*command, "--out", str(planned), "--vram", "16", "--weights", "fp32"]) == 0
    command[1] = "a fox"
    assert main([*command, "--lora", f"{loras / 'ink.safetensors'}:0.8", "--out", str(given)]) == 0
    assert read_settings(plain).loras == read_settings(planned).loras == (("ink", 0.8),)
    one, other = (Image.open(file).tobytes() for file in (plain, given))
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1
    command[1] = "a fox <lora:pen:1>"
    assert main([*command, "--out", str(tmp_path / "d.png")]) == 2
    assert "unknown LoRA 'pen'" in capsys.readouterr().err
