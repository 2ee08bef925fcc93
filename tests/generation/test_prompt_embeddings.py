"""Textual inversions of SDXL: as diffusers loads them, by name, in prompts of any kind."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from koala.checkpoints.inspect import inspect
from koala.checkpoints.textual_inversion import read_embedding
from koala.cli import main
from koala.errors import UserError
from koala.generation import load, read_settings
from koala.generation.prompt_embeddings import named_embeddings, split_names
from toy import TEXT_WIDTHS


def saved(file: Path, vectors: int = 3, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    sizes = zip(("clip_l", "clip_g"), TEXT_WIDTHS, strict=True)
    save_file({n: 0.5 * torch.randn(vectors, w, generator=generator) for n, w in sizes}, file)
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    saved(folder / "zork.safetensors")
    saved(folder / "zork-two.safetensors", vectors=1, seed=1)
    saved(folder / "long.safetensors", vectors=25, seed=2)
    return folder


@pytest.fixture(scope="module")
def pipeline(toy_sdxl):
    return load(toy_sdxl, "cpu")


@torch.inference_mode()
def row(pipeline, prompt, **asked):
    return pipeline.begin(pipeline.requests(prompt, steps=2, seed=1, **asked)[0])


@pytest.mark.parametrize("names", [["zork"], ["zork-two"], ["zork", "zork-two"]])
def test_embeddings_equal_diffusers(toy_sdxl, pipeline, files, names):
    """Its `load_textual_inversion`, of each encoder; the name in the middle of a prompt."""
    theirs = StableDiffusionXLPipeline.from_pretrained(toy_sdxl)
    paths = [files / f"{name}.safetensors" for name in names]
    for path, token in zip(paths, ("zork", "spam"), strict=False):
        vectors = load_file(path)
        for key, encoder, tokenizer in (
            ("clip_l", theirs.text_encoder, theirs.tokenizer),
            ("clip_g", theirs.text_encoder_2, theirs.tokenizer_2),
        ):
            theirs.load_textual_inversion(
                vectors[key], token=token, text_encoder=encoder, tokenizer=tokenizer
            )
    prompt = "a {} fox"
    expected = theirs.encode_prompt(
        prompt.format(" ".join(("zork", "spam")[: len(names)])), device="cpu",
        do_classifier_free_guidance=False,
    )  # fmt: skip
    found = row(pipeline, prompt.format(" ".join(names)), embedding=paths, guidance=1.0).condition
    torch.testing.assert_close(found.text, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled, expected[2], atol=1e-5, rtol=0)
    plain = row(pipeline, "a fox", guidance=1.0).condition
    assert (found.text - plain.text).abs().max() > 1e-2


def test_names_are_words_in_any_case_and_longer_ones_win():
    assert split_names("a Zork, zork-two, zorkish", ["zork", "zork-two"]) == [
        "a ", "Zork", ", ", "zork-two", ", zorkish",
    ]  # fmt: skip
    assert split_names("a fox", []) == ["a fox"]


def test_weights_changes_and_chunks_work_with_them(pipeline, files):
    asked = {"embedding_dir": files, "guidance": 1.0}
    light, heavy = (row(pipeline, f"a (zork:{w}) fox", **asked).condition for w in (1.0, 1.5))
    moved = (light.text - heavy.text).abs().amax((0, 2))
    assert (moved[2:5] > 1e-3).all() and (moved[:2] < 1e-6).all()  # after start and "a"
    changing = row(pipeline, "a [fox:zork:1]", **asked)
    after = row(pipeline, "a zork", **asked).condition
    assert torch.equal(changing.later[0][0].text, after.text)
    # 30 tokens fit: the embedding of 25 begins a new chunk, and is not split.
    words = "a fox on ice"
    chunked = row(pipeline, f"{words} long", **asked).condition
    parted = row(pipeline, f"{words} BREAK long", **asked).condition
    assert chunked.text.shape[1] == 64
    torch.testing.assert_close(chunked.text, parted.text, atol=1e-6, rtol=0)


def test_a_name_means_an_embedding_only_where_it_is_given(pipeline, files):
    plain = row(pipeline, "a zork").condition
    found = row(pipeline, "a zork", embedding=[files / "zork.safetensors"]).condition
    again = row(pipeline, "a zork").condition
    assert torch.equal(plain.text, again.text) and not torch.equal(plain.text, found.text)
    negative = row(pipeline, "a fox", negative_prompt="Zork", embedding_dir=files)
    assert negative.unconditional is not None
    assert pipeline.requests("a fox", embedding_dir=files)[0].embeddings == ()


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"clip_g": torch.zeros(2, 24)}, "it holds clip_g alone; SDXL's has two tensors"),
        ({"emb_params": torch.zeros(2, 1280)}, "of SDXL's second text encoder alone, or of the r"),
        ({"emb_params": torch.zeros(2, 2048)}, "for a text encoder 2048 wide, which no SDXL has"),
        ({"clip_l": torch.zeros(2, 768), "t5": torch.zeros(2, 4096)}, "of Flux or SD 3"),
        (
            {n: torch.zeros(2, 16) for n in ("clip_l", "clip_g", "t5xxl")},
            "is a textual inversion of Flux or SD 3",
        ),
        ({"lora_unet_a.lora_up.weight": torch.zeros(4, 4)}, "is a LoRA, which --lora reads"),
    ],
)
def test_other_forms_of_embeddings_are_called_what_they_are(tmp_path, tensors, told):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=told) as caught:
        read_embedding(tmp_path / "x.safetensors", TEXT_WIDTHS)
    assert "\n" not in str(caught.value)


def test_an_image_with_an_embedding_inside_is_called_that(tmp_path):
    (tmp_path / "zork.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with pytest.raises(UserError, match=r"is an image; embeddings inside images, .* are not"):
        read_embedding(tmp_path / "zork.png", TEXT_WIDTHS)


def test_embeddings_of_other_models_are_refused_by_name(files, tmp_path, pipeline):
    file = tmp_path / "x.safetensors"
    for tensors, told in (
        ({"emb_params": torch.zeros(2, 768)}, "is a textual inversion of SD 1.5"),
        ({"<tok>": torch.zeros(768)}, "is a textual inversion of SD 1.5"),
        ({"emb_params": torch.zeros(2, 1024)}, "is a textual inversion of SD 2"),
        (
            {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
            "768 and 1280 wide; this",
        ),
        ({"clip_l": torch.zeros(2, 16)}, "is no textual inversion of SDXL: it holds clip_l"),
        ({"clip_l": torch.zeros(0, 16), "clip_g": torch.zeros(1, 24)}, "damaged"),
        ({"clip_l": torch.zeros(1, 16).int(), "clip_g": torch.zeros(1, 24)}, "must be floats"),
    ):
        save_file(tensors, file)
        with pytest.raises(UserError, match=told) as caught:
            read_embedding(file, TEXT_WIDTHS)
        assert "\n" not in str(caught.value)
    save_file({"clip_l": torch.full((1, 16), float("nan")), "clip_g": torch.zeros(1, 24)}, file)
    with pytest.raises(UserError, match="has NaN"):
        row(pipeline, "an x", embedding=[file])
    with pytest.raises(UserError, match=r"zork\.safetensors is named in no prompt: write 'zork'"):
        named_embeddings(["a fox"], [files / "zork.safetensors"], None)
    with pytest.raises(UserError, match="two embeddings are called 'zork'"):
        named_embeddings(["zork"], [files / "zork.safetensors"] * 2, None)
    assert "a textual inversion of SDXL" in inspect(files / "zork.safetensors").kind


def test_generate_draws_with_one(toy_sdxl, files, tmp_path, capsys):
    out = tmp_path / "a.png"
    command = ["generate", "a zork", "--model", str(toy_sdxl), "--device", "cpu", "--steps", "2",
               "--seed", "1", "--out", str(out)]  # fmt: skip
    assert main([*command, "--embedding", str(files / "zork.safetensors")]) == 0
    assert read_settings(out).embeddings == ("zork",)
    missing = [*command[:-1], str(tmp_path / "b.png"), "--embedding", str(tmp_path / "zork.pt")]
    assert main(missing) == 2
    assert "zork.pt" in capsys.readouterr().err
