"""Compression: every student tensor is, bit for bit, the teacher tensor that the map names."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from koala.architectures.block_map import DEPTH_RULES, block_map, tensor_map
from koala.architectures.config import unet_config
from koala.architectures.layout import tensor_shapes
from koala.architectures.table import CUTS, UNetArchitecture, get, student_of
from koala.checkpoints import card_facts, model_card
from koala.checkpoints.compress import adopt, compress
from koala.checkpoints.load import load_unet
from koala.checkpoints.validate import WEIGHTS, unet_architecture
from koala.errors import UserError
from toy import toy_pipeline

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
FULL = [
    ("sdxl", "koala-700m"), ("sdxl", "koala-1b"), ("sdxl", "bk-sdxl"),
    ("sdxl-mini", "koala-mini"), ("sdxl-mini", "koala-mini-1b"),
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "teacher", seed=1)


@cache
def shapes(arch: UNetArchitecture) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = UNet2DConditionModel(**unet_config(arch)).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


# --- the map --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", DEPTH_RULES)
@pytest.mark.parametrize(("teacher_name", "student_name"), FULL)
def test_map_covers_the_real_student_with_equal_shapes(teacher_name, student_name, rule):
    arch, student = get(teacher_name), get(student_name)
    names = tensor_map(arch, student, rule)
    of_teacher, of_student = shapes(arch), shapes(student)
    assert names.keys() == of_student.keys()  # nothing is left as initialised
    assert all(of_teacher[names[name]] == shape for name, shape in of_student.items())
    assert len(set(names.values())) == len(names)


def test_map_says_what_the_facts_say():
    blocks = block_map(get("sdxl"), get("koala-700m"))
    assert blocks["down_blocks.2.attentions.0"] == "down_blocks.2.attentions.0"
    assert blocks["up_blocks.0.resnets.0"] == "up_blocks.0.resnets.0"
    assert blocks["up_blocks.0.resnets.1"] == "up_blocks.0.resnets.2"
    assert blocks["up_blocks.2.resnets.1"] == "up_blocks.2.resnets.2"
    assert blocks["up_blocks.1.upsamplers.0"] == "up_blocks.1.upsamplers.0"
    block = "up_blocks.0.attentions.{}.transformer_blocks.{}"
    assert blocks[block.format(1, 3)] == block.format(2, 3)
    assert not any(name.startswith("mid_block") for name in blocks)
    assert sum("transformer_blocks" in name for name in blocks) == 21
    blocks = block_map(get("sdxl"), get("koala-1b"))
    assert sum("transformer_blocks" in name for name in blocks) == 2 + 6 + 6 + 12 + 4
    assert blocks["mid_block.resnets.1"] == "mid_block.resnets.1"


@pytest.mark.parametrize(
    ("rule", "kept"), [("bottom", [0, 1, 2, 3, 4]), ("interleave", [0, 2, 4, 6, 8]),
                   ("up", [5, 6, 7, 8, 9])],
)  # fmt: skip
def test_depth_rules(rule, kept):
    blocks = block_map(get("sdxl"), get("koala-700m"), rule)
    stem = "down_blocks.2.attentions.0.transformer_blocks."
    assert [int(blocks[f"{stem}{k}"].removeprefix(stem)) for k in range(5)] == kept


@settings(deadline=None, max_examples=60)
@given(
    depths=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 12)),
    cut=st.sampled_from(sorted(CUTS)),
    rule=st.sampled_from(sorted(DEPTH_RULES)),
)
def test_map_of_any_depths(depths, cut, rule):
    up = tuple((depth,) * 3 for depth in reversed(depths))
    arch = replace(get("sdxl-mini"), depths=depths, up=up, mid=depths[-1])
    student = student_of(arch, cut)
    names = tensor_map(arch, student, rule)
    of_teacher, of_student = tensor_shapes(arch), tensor_shapes(student)
    assert names.keys() == of_student.keys()
    assert all(of_teacher[names[name]] == shape for name, shape in of_student.items())
    assert len(set(names.values())) == len(names)


def test_map_of_a_unet_to_itself_is_the_identity():
    names = tensor_map(get("sdxl"), get("sdxl"), "interleave")
    assert all(mine == theirs for mine, theirs in names.items())


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"'middle'.*bottom, interleave, up"):
        block_map(get("sdxl"), get("koala-1b"), "middle")
    with pytest.raises(UserError, match="koala-mini cannot inherit from sdxl"):
        block_map(get("sdxl"), get("koala-mini"))
    theirs = "it has 2 layers a block, depths 0,2,10 and a mid block, the teacher 1 layer a block"
    with pytest.raises(UserError, match=f"sdxl cannot inherit from koala-1b.*{theirs}"):
        block_map(get("koala-1b"), get("sdxl"))
    with pytest.raises(UserError, match="different numbers of stages"):
        block_map(get("sdm-v2.0"), get("koala-1b"))


# --- the folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", DEPTH_RULES)
@pytest.mark.parametrize("cut", CUTS)
def test_every_student_tensor_is_the_named_teacher_tensor(teacher, tmp_path, cut, rule):
    report = compress(teacher, cut, tmp_path / "student", depth_rule=rule)
    names = tensor_map(unet_architecture(teacher), unet_architecture(report.out), rule)
    before, after = load_file(teacher / UNET), load_file(report.out / UNET)
    assert after.keys() == names.keys()
    for mine, theirs in names.items():
        assert torch.equal(after[mine], before[theirs]), mine
    assert after.keys() == load_unet(report.out).state_dict().keys()
    assert (report.teacher, report.student) == ("custom", f"{cut} of custom")
    assert report.inherited == len(after)
    assert report.dropped == len(before) - len(after)
    assert report.student_parameters == sum(tensor.numel() for tensor in after.values())
    assert report.bytes == (report.out / UNET).stat().st_size


def test_a_cut_that_removes_nothing_says_so(teacher, tmp_path):
    student = compress(teacher, "koala-700m", tmp_path / "student").out
    report = compress(student, "0,1,1,no-mid", tmp_path / "again")
    assert report.dropped == 0 and report.line().endswith(f"{tmp_path / 'again'} is a copy")
    assert (student / UNET).read_bytes() == (report.out / UNET).read_bytes()


def test_result_is_a_whole_pipeline(teacher, tmp_path):
    out = compress(teacher, "koala-700m", str(tmp_path / "new" / "student")).out
    pipe = StableDiffusionXLPipeline.from_pretrained(out)
    assert type(pipe.scheduler) is EulerDiscreteScheduler
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.scheduler.config.beta_end == 0.012
    assert pipe.unet.config.mid_block_type is None
    assert pipe.unet.config.layers_per_block == 1
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        copied = {p.name: p.read_bytes() for p in (out / name).iterdir()}
        assert copied == {p.name: p.read_bytes() for p in (teacher / name).iterdir()}
    assert not [p for p in out.parent.iterdir() if p != out]
    images = pipe("a", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_dtype_converts_all_weights(teacher, tmp_path, dtype, kind):
    full = compress(teacher, "koala-700m", tmp_path / "fp32")
    half = compress(teacher, "koala-700m", tmp_path / "half", dtype=dtype)
    for component, stem in WEIGHTS.items():
        file = f"{component}/{stem}.safetensors"
        expected = load_file(full.out / file)
        for name, tensor in load_file(half.out / file).items():
            assert tensor.dtype is kind
            assert torch.equal(tensor, expected[name].to(kind))
    assert half.bytes < 0.6 * full.bytes
    assert load_unet(half.out).dtype is torch.float32


def test_sharded_teacher_gives_the_same_student(teacher, tmp_path):
    whole = compress(teacher, "koala-1b", tmp_path / "whole").out
    StableDiffusionXLPipeline.from_pretrained(teacher).save_pretrained(
        tmp_path / "sharded", max_shard_size="200KB"
    )
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 1
    parts = compress(tmp_path / "sharded", "koala-1b", tmp_path / "parts").out
    assert (parts / UNET).read_bytes() == (whole / UNET).read_bytes()


def copy_with_unet(teacher: Path, folder: Path, change) -> Path:
    shutil.copytree(teacher, folder)
    tensors = load_file(folder / UNET)
    change(tensors)
    save_file(tensors, folder / UNET)
    return folder


def test_wrong_teachers_are_refused_by_what_is_wrong(teacher, tmp_path):
    out = tmp_path / "out"
    koala = toy_pipeline(tmp_path / "koala", architecture="koala")
    with pytest.raises(UserError, match="has layers_per_block 1, an SDXL U-Net has 2"):
        compress(koala, "koala-700m", out)

    def lose(tensors):
        for name in sorted(tensors)[:13]:
            del tensors[name]

    with pytest.raises(UserError, match=r"missing tensors: (\S+, ){9}\S+ and 3 more$"):
        compress(copy_with_unet(teacher, tmp_path / "lost", lose), "koala-700m", out)

    def bend(tensors):
        tensors["conv_in.weight"] = torch.zeros(16, 9, 3, 3)

    with pytest.raises(UserError, match=r"shape: conv_in.weight \[16, 9, 3, 3\], expected \[16, 4"):
        compress(copy_with_unet(teacher, tmp_path / "bent", bend), "koala-700m", out)

    def overflow(tensors):
        tensors["conv_out.bias"][0] = 1e9

    large = copy_with_unet(teacher, tmp_path / "large", overflow)
    with pytest.raises(UserError, match="too large for F16; use fp32 or bf16"):
        compress(large, "koala-700m", out, dtype="fp16")

    def integers(tensors):
        tensors["conv_out.bias"] = tensors["conv_out.bias"].to(torch.int32)

    with pytest.raises(UserError, match="holds I32 weights"):
        compress(copy_with_unet(teacher, tmp_path / "int", integers), "koala-700m", out)

    plain = copy_with_unet(teacher, tmp_path / "plain", lambda tensors: None)
    config = json.loads((plain / "unet" / "config.json").read_text())
    config["addition_embed_type"] = None
    (plain / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no addition embedding"):
        compress(plain, "koala-700m", out)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"koala", "lost", "bent", "large", "int", "plain"}  # nothing half-written


@pytest.mark.parametrize("to", ["0,1,1,no-mid", "0,0,2", "0,1,2", "0,1,0"])
def test_depths_of_ones_own(teacher, tmp_path, to):
    """The student is described by its config alone: what is written there loads and distils."""
    report = compress(teacher, to, tmp_path / "student")
    depths = [int(number) for number in to.removesuffix(",no-mid").split(",")]
    arch = unet_architecture(report.out)
    assert (arch.layers, list(arch.depths)) == (1, depths)
    assert arch.up == tuple((depth, depth) for depth in reversed(depths))
    assert arch.mid == (None if to.endswith("no-mid") else depths[-1])
    unet, expected = load_unet(report.out), load_file(teacher / UNET)
    names = tensor_map(unet_architecture(teacher), arch)
    state = unet.state_dict()
    assert state.keys() == names.keys()
    assert all(torch.equal(state[mine], expected[names[mine]]) for mine in names)
    assert report.student_parameters == sum(p.numel() for p in unet.parameters())


def test_depths_of_ones_own_may_be_a_known_student():
    sdxl = get("sdxl")
    assert student_of(sdxl, "0,2,5,no-mid").name == "koala-700m"
    assert student_of(sdxl, "0,2,10").name == "bk-sdxl"
    assert student_of(sdxl, "0,2,4,no-mid").name == "custom"


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("0,2", "depths 0,2 cannot be cut from 0,1,2: give 3 numbers"),
        ("0,2,2", "none above the teacher's"),
        ("1,1,1", "none above the teacher's"),
        ("0,0,0", "not all 0"),
        ("0,1,-1", "unknown student '0,1,-1'"),
        ("0,1,2 no mid", "or depths such as 0,2,4 or 0,2,4,no-mid"),
        ("0,1,99999999999", "unknown student"),
        ("", "unknown student ''"),
    ],
)
def test_depths_that_are_none(teacher, tmp_path, to, message):
    with pytest.raises(UserError, match=message):
        compress(teacher, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_wrong_settings_are_refused(teacher, tmp_path):
    with pytest.raises(UserError, match=r"'koala-2b'.*koala-700m"):
        compress(teacher, "koala-2b", tmp_path / "out")
    with pytest.raises(UserError, match=r"'int8'.*fp32, fp16, bf16"):
        compress(teacher, "koala-1b", tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match=r"'middle'"):
        compress(teacher, "koala-1b", tmp_path / "out", depth_rule="middle")
    with pytest.raises(UserError, match="not empty"):
        compress(teacher, "koala-1b", teacher)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        compress(teacher, "koala-1b", tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        compress(teacher, "koala-1b", tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    compress(teacher, "koala-1b", tmp_path / "empty")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "empty"}


def test_credits_come_along(teacher, tmp_path):
    (teacher / "NOTICE.txt").write_text("drawn by many\n")
    compress(teacher, "koala-700m", tmp_path / "student")
    assert (tmp_path / "student" / "NOTICE.txt").read_text() == "drawn by many\n"


# --- a student that goes on -----------------------------------------------------------------


def test_a_student_goes_on_beside_another_teachers_encoders(teacher, tmp_path):
    student = toy_pipeline(tmp_path / "student", seed=2, architecture="koala")
    adopt(student, teacher, "koala-700m", tmp_path / "start")
    assert (tmp_path / "start" / UNET).read_bytes() == (student / UNET).read_bytes()
    for component in ("vae", "text_encoder", "text_encoder_2"):
        file = f"{component}/{WEIGHTS[component]}.safetensors"
        assert (tmp_path / "start" / file).read_bytes() == (teacher / file).read_bytes()
    scheduler = json.loads((tmp_path / "start/scheduler/scheduler_config.json").read_text())
    assert scheduler["timestep_spacing"] == "trailing"
    assert load_unet(tmp_path / "start").config.layers_per_block == 1


def test_both_licences_go_with_it(teacher, tmp_path):
    """The student's own, for its U-Net, and the teacher's; once where they are one."""
    ours = compress(teacher, "koala-700m", tmp_path / "student").out
    theirs = shutil.copytree(teacher, tmp_path / "teacher")
    (theirs / model_card.FILE).write_text("---\nlicense: openrail++\n---\n")
    mine = model_card.read(ours)
    for licence, expected in (
        (card_facts.Licence("openrail++"), card_facts.Licence("openrail++")),
        (
            card_facts.Licence("other", "terms of Ann", "https://example.org"),
            card_facts.Licence(
                "other",
                "U-Net: terms of Ann, https://example.org; VAE and text encoders: openrail++",
            ),
        ),
    ):
        model_card.write(replace(mine, licence=licence), ours)
        adopt(ours, theirs, "koala-700m", tmp_path / "begun")
        told = model_card.read(tmp_path / "begun")
        assert (told.title, told.cut, told.licence) == ("begun", mine.cut, expected)
        shutil.rmtree(tmp_path / "begun")


def test_what_is_no_such_student_is_refused(teacher, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="the U-Net custom, but this recipe trains koala-700m"):
        adopt(teacher, teacher, "koala-700m", out)
    other = toy_pipeline(tmp_path / "other", architecture="koala")
    scheduler = other / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match=r"predicts v, but .* predicts epsilon"):
        adopt(other, teacher, "koala-700m", out)
    upper = compress(teacher, "koala-700m", tmp_path / "upper", depth_rule="up").out
    with pytest.raises(UserError, match=r"cut by depth rule 'up'.*--set settings\.depth_rule=up"):
        adopt(upper, teacher, "koala-700m", out)
    assert not out.exists()
