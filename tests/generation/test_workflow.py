"""ComfyUI workflows: every link leads to a node, and every setting is in it or refused."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from koala.cli import main
from koala.errors import UserError
from koala.generation.requests import Settings
from koala.generation.samplers import SAMPLERS, get
from koala.generation.workflow import workflow

PLAIN = Settings("a fox", "", 10, 3.5, 7, 1024, 768, "my-koala", "0.2.0")
NODES = {  # the inputs of each node in ComfyUI
    "CheckpointLoaderSimple": {"ckpt_name"},
    "LoraLoader": {"model", "clip", "lora_name", "strength_model", "strength_clip"},
    "RescaleCFG": {"model", "multiplier"},
    "CLIPTextEncode": {"clip", "text"},
    "ConditioningZeroOut": {"conditioning"},
    "EmptyLatentImage": {"width", "height", "batch_size"},
    "KSampler": {
        "model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative",
        "latent_image", "denoise",
    },
    "VAEDecode": {"samples", "vae"},
    "SaveImage": {"images", "filename_prefix"},
}  # fmt: skip


def of_kind(nodes: dict, kind: str) -> list[dict]:
    return [node["inputs"] for node in nodes.values() if node["class_type"] == kind]


def checked(settings: Settings, **options) -> dict:
    """The workflow, whose nodes have ComfyUI's inputs and only link to nodes before them."""
    nodes = workflow(settings, **options)
    for number, node in nodes.items():
        assert node["inputs"].keys() == NODES[node["class_type"]]
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert int(value[0]) < int(number)
    return nodes


def test_an_empty_negative_prompt_is_zeros():
    nodes = checked(PLAIN)
    (sampled,) = of_kind(nodes, "KSampler")
    negative = nodes[sampled["negative"][0]]
    assert negative["class_type"] == "ConditioningZeroOut"
    assert (sampled["seed"], sampled["steps"], sampled["cfg"]) == (7, 10, 3.5)
    assert (sampled["sampler_name"], sampled["scheduler"]) == ("euler", "sgm_uniform")
    assert of_kind(nodes, "EmptyLatentImage") == [{"width": 1024, "height": 768, "batch_size": 1}]
    assert of_kind(nodes, "CheckpointLoaderSimple") == [{"ckpt_name": "my-koala.safetensors"}]
    assert checked(PLAIN, checkpoint="x.safetensors")["1"]["inputs"]["ckpt_name"] == "x.safetensors"


def test_every_setting_is_in_it():
    loras = (("style", 0.8), ("detail", -0.5))
    settings = replace(PLAIN, negative_prompt="blur", loras=loras, guidance_rescale=0.7)
    nodes = checked(settings)
    assert not of_kind(nodes, "ConditioningZeroOut")
    assert [one["text"] for one in of_kind(nodes, "CLIPTextEncode")] == ["a fox", "blur"]
    found = [(n["lora_name"], n["strength_model"]) for n in of_kind(nodes, "LoraLoader")]
    assert found == [("style.safetensors", 0.8), ("detail.safetensors", -0.5)]
    assert of_kind(nodes, "RescaleCFG")[0]["multiplier"] == 0.7
    (sampled,) = of_kind(nodes, "KSampler")
    assert nodes[sampled["model"][0]]["class_type"] == "RescaleCFG"


@pytest.mark.parametrize("name", [*SAMPLERS, "dpm++2m-karras", "euler-uniform", "ddim-beta"])
def test_samplers_and_steps_have_a_name_there_or_are_refused(name):
    kind, spacing = get(name)
    settings = replace(PLAIN, sampler=kind.name, schedule=spacing)
    if name in ("unipc", "lcm", "ddim-beta"):
        with pytest.raises(UserError, match=f"ComfyUI has not the sampler {kind.name} with"):
            workflow(settings)
    else:
        (found,) = of_kind(checked(settings), "KSampler")
        named = {"karras": "karras", "uniform": "normal"}.get(spacing, "sgm_uniform")
        assert found["sampler_name"] and found["scheduler"] == named


@pytest.mark.parametrize(
    ("prompt", "there"),
    [
        ("a fox, noto style", "a fox, noto style"),
        ("a (red:1.3) [fox]", "a (red:1.3) (fox:0.9091)"),
        ("((red:1.2) fox:1.5)", "(red:1.8)( fox:1.5)"),  # nested weights do not multiply there
        (r"a fox \(animal\), \[x\]", r"a fox \(animal\), [x]"),
        ("[cat:dog:0]", "dog"),
    ],
)
def test_prompts_are_in_its_syntax(prompt, there):
    nodes = checked(replace(PLAIN, prompt=prompt, negative_prompt=prompt))
    assert [one["text"] for one in of_kind(nodes, "CLIPTextEncode")] == [there, there]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "[cat:dog:0.5]"}, "have no changes over the steps: leave out --workflow"),
        ({"prompt": "a fox BREAK an owl"}, "have no BREAK: leave out --workflow"),
        ({"negative_prompt": "[cat|dog]"}, "have no changes over the steps"),
        ({"embeddings": ("my-style",)}, "without textual inversions: leave out --workflow"),
    ],
)
def test_prompts_that_it_has_no_words_for_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        workflow(replace(PLAIN, **change))


@pytest.mark.parametrize("change", [{"image": "abc"}, {"guidance_until": 0.5}])
def test_what_it_cannot_say_is_refused(change):
    with pytest.raises(UserError, match="ComfyUI workflow is made for images from noise"):
        workflow(replace(PLAIN, **change))


def test_the_commands_write_it(tmp_path, capsys):
    out, file = tmp_path / "fox.png", tmp_path / "mini.safetensors"
    drawn = ["generate", "a fox", "--seed", "3", "--steps", "2", "--device", "cpu"]
    assert main([*drawn, "--out", str(out), "--workflow"]) == 0
    with Image.open(out) as image:
        assert of_kind(json.loads(image.info["prompt"]), "KSampler")[0]["seed"] == 3
    there = tmp_path / "w.json"
    assert main(["convert", "koala-mini", "--to", "single-file", "--out", str(file),
                 "--workflow", str(there)]) == 0  # fmt: skip
    nodes = json.loads(there.read_text())
    assert of_kind(nodes, "CheckpointLoaderSimple") == [{"ckpt_name": "mini.safetensors"}]
    assert of_kind(nodes, "EmptyLatentImage")[0]["width"] == 128
    assert main(["convert", "koala-mini", "--to", "diffusers", "--out", str(tmp_path / "d"),
                 "--workflow", str(there)]) == 2  # fmt: skip
    assert "--workflow is for --to single-file" in capsys.readouterr().err
    late = ["--out", str(tmp_path / "late.png"), "--workflow", "--guidance-until", "0.5"]
    assert main([*drawn, *late]) == 2
    second = [*drawn[:2], "a fox BREAK an owl", *drawn[2:], "--workflow"]
    assert main([*second, "--out", str(tmp_path / "two")]) == 2  # before anything is drawn
    assert "have no BREAK" in capsys.readouterr().err and not (tmp_path / "two").exists()
