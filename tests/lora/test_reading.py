"""LoRA files: every key of SDXL's on the right module of a student, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_unet_lora_key,
    _maybe_map_sgm_blocks_to_diffusers,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from koala.architectures.config import from_unet_config, unet_config
from koala.architectures.table import ARCHITECTURES
from koala.checkpoints.convert import convert
from koala.checkpoints.tensors import read_metadata
from koala.errors import UserError
from koala.lora.conversion import convert_lora
from koala.lora.names import Target, base_named, shapes, spellings, targets
from koala.lora.reading import read, teacher_of
from toy import toy_unet
from toy_lora import FORMS, toy_base, toy_lora

SDXL = base_named("sdxl")
TOY, TOY_STUDENT = toy_base(toy_unet("sdxl")), toy_base(toy_unet("koala"))


def attention(target: Target) -> bool:
    """What sd-scripts trains by default: the linear layers in and around attention."""
    return target.part != "unet" or ".attentions." in target.path


def write(file: Path, stems: dict[str, tuple[int, ...]]) -> Path:
    """A LoRA of rank 1 in kohya's spelling, of zeros: stem -> weight shape."""
    tensors = {}
    for stem, weight in stems.items():
        ones = (1,) * len(weight[2:])
        tensors[f"{stem}.lora_down.weight"] = torch.zeros(1, *weight[1:], dtype=torch.float16)
        tensors[f"{stem}.lora_up.weight"] = torch.zeros(weight[0], 1, *ones, dtype=torch.float16)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, file)
    return file


# --- what trainings leave in names and numbers ----------------------------------------------


@pytest.mark.parametrize("wrapped", ["module.unet.", "unet._orig_mod.", "state_dict.unet."])
def test_names_that_a_training_wrapped_are_the_same_modules(wrapped, tmp_path):
    plain = toy_lora(tmp_path / "plain.safetensors", TOY, "PEFT", lambda t: t.part == "unet")
    renamed = {n.replace("unet.", wrapped, 1): t for n, t in load_file(plain).items()}
    save_file(renamed, tmp_path / "wrapped.safetensors")
    assert (
        read(tmp_path / "wrapped.safetensors", TOY).adapters.keys()
        == read(plain, TOY).adapters.keys()
    )


def test_an_alpha_may_be_a_whole_number(tmp_path):
    file = toy_lora(tmp_path / "x.safetensors", TOY, "kohya", attention, rank=2, alpha=4.0)
    tensors = load_file(file)
    save_file({n: t.long() if n.endswith("alpha") else t for n, t in tensors.items()}, file)
    assert {adapter.factor for adapter in read(file, TOY).adapters.values()} == {2.0}
    save_file({n: t.char() if "down" in n else t for n, t in tensors.items()}, file)
    with pytest.raises(UserError, match="holds I8 tensors; they must be floats"):
        read(file, TOY)


# --- names, at full size --------------------------------------------------------------------


def test_kohyas_count_of_modules():
    """What sd-scripts counts when it makes a LoRA for SDXL: 722 in the U-Net, 72 and 192."""
    counted = [t.part for t in shapes(SDXL) if attention(t) and t.path != "text_projection"]
    assert [counted.count(p) for p in ("unet", "text_encoder", "text_encoder_2")] == [722, 72, 192]


def test_kohyas_names_as_sd_scripts_writes_them():
    names = targets(SDXL)
    for stem, path in {
        "input_blocks_0_0": "conv_in",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0."
        "transformer_blocks.0.attn1.to_q",
        "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": "down_blocks.2.attentions.1."
        "transformer_blocks.9.ff.net.0.proj",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0": "up_blocks.0.attentions.2."
        "transformer_blocks.0.attn2.to_out.0",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
        "output_blocks_8_0_emb_layers_1": "up_blocks.2.resnets.2.time_emb_proj",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
        "out_2": "conv_out",
        "down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_k": "down_blocks.2.attentions."
        "1.transformer_blocks.9.attn2.to_k",
        "up_blocks_1_upsamplers_0_conv": "up_blocks.1.upsamplers.0.conv",
    }.items():
        assert names[f"lora_unet_{stem}"][1] == Target("unet", path)
    for stem, part in {"te1": "text_encoder", "te2": "text_encoder_2"}.items():
        path = "text_model.encoder.layers.11.self_attn.out_proj"
        found = names[f"lora_{stem}_text_model_encoder_layers_11_self_attn_out_proj"]
        assert found[1] == Target(part, path)
    assert "lora_te1_text_model_encoder_layers_12_mlp_fc1" not in names
    assert "lora_te2_text_model_encoder_layers_31_mlp_fc1" in names


@pytest.mark.parametrize("name", ["sdxl", "koala-700m", "koala-1b", "bk-sdxl"])
def test_original_names_are_those_that_diffusers_understands(name):
    """Diffusers' own renaming of all of kohya's names leads to the modules that ours does."""

    class Config:
        layers_per_block = unet_config(ARCHITECTURES[name])["layers_per_block"]

    stems = spellings(base_named(name))["kohya, original names"]
    ending = ".lora_down.weight"
    found = _maybe_map_sgm_blocks_to_diffusers({s + ending: s for s in stems.values()}, Config)
    theirs = {stem: _convert_unet_lora_key(key) for key, stem in found.items()}
    for target, stem in stems.items():
        if "add_embedding" not in target.path:  # written in a place of its own, tested above
            path = target.path.replace("attn1.", "attn1.processor.")
            path = path.replace("attn2.", "attn2.processor.")
            path = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".\1_lora", path)
            end = ".down.weight" if path.endswith("_lora") else ".lora.down.weight"
            assert theirs[stem] == path + end


@pytest.mark.parametrize("name", list(FORMS))
def test_no_two_modules_share_a_name(name):
    (unet, *_), (text, *_) = FORMS[name]
    stems = [s for form in (unet, text) if form for s in spellings(SDXL)[form].values()]
    assert len(stems) == len(set(stems)) > 500
    assert all(targets(SDXL)[s][1] in shapes(SDXL) for s in stems)


# --- the map, at full size ------------------------------------------------------------------

ABSENT = None


def by_hand(path: str, depth: int, mid: bool) -> str | None:
    """Where KOALA has what SDXL calls `path`, said once more and in another way."""
    block = re.search(r"transformer_blocks\.(\d+)", path)
    wide = path.startswith(("down_blocks.2", "mid_block", "up_blocks.0"))
    if block and wide and int(block[1]) >= depth:
        return ABSENT
    if path.startswith("mid_block"):
        return path if mid else ABSENT
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)(.*)", path)
    if not found:
        return path
    side, stage, kind, layer, rest = found.groups()
    new = {"down": {"0": "0"}, "up": {"0": "0", "2": "1"}}[side].get(layer)
    return ABSENT if new is None else f"{side}_blocks.{stage}.{kind}.{new}{rest}"


@pytest.mark.parametrize("form", ["kohya, original names", "kohya, diffusers names"])
@pytest.mark.parametrize(
    ("name", "depth", "mid", "applied"),
    [("koala-700m", 5, False, 222), ("koala-1b", 6, True, 314), ("bk-sdxl", 10, True, 474)],
)
def test_every_key_of_a_full_lora_finds_its_module(tmp_path, form, name, depth, mid, applied):
    """U-Net: 222 of 722 modules fit KOALA-700M, 314 KOALA-1B; 264 of the text encoders all."""
    chosen = [t for t in shapes(SDXL) if attention(t) and t.path != "text_projection"]
    stems = spellings(SDXL)[form] | spellings(SDXL)["kohya, text"]
    file = write(tmp_path / "full.safetensors", {stems[t]: shapes(SDXL)[t] for t in chosen})
    lora = read(file, base_named(name))
    assert lora.report.made_for == "sdxl"
    assert lora.report.modules == 722 + 264
    assert lora.report.parts == {"unet": applied, "text_encoder": 72, "text_encoder_2": 192}
    assert sum(n for b in lora.report.dropped.values() for n in b.values()) == 722 - applied
    for target in chosen:
        expected = by_hand(target.path, depth, mid) if target.part == "unet" else target.path
        moved = lora.moves.get(target)
        assert (moved and moved.path) == expected
        if moved:
            assert lora.adapters[moved].factors["down"] == lora.entries[target].roles["down"]


def test_what_is_dropped_is_told_by_reason_and_block(tmp_path):
    file = toy_lora(tmp_path / "a.safetensors", TOY, "diffusers", attention)
    report = read(file, TOY_STUDENT, TOY.unet).report
    assert report.dropped == {
        "of layers cut": {
            "down_blocks.1.attentions.1": 12,
            "down_blocks.2.attentions.1": 22,
            "up_blocks.0.attentions.1": 22,
            "up_blocks.1.attentions.1": 12,
        },
        "of depth cut": {
            "down_blocks.2.attentions.0.transformer_blocks.1": 10,
            "up_blocks.0.attentions.0.transformer_blocks.1": 10,
            "up_blocks.0.attentions.2.transformer_blocks.1": 10,
        },
        "of the mid block": {"mid_block.attentions.0": 22},
    }
    assert report.line() == (
        "LoRA a, made for custom: 103 of 223 modules fit custom; "
        "dropped: 68 of layers cut, 30 of depth cut, 22 of the mid block"
    )


def test_a_students_teacher():
    named = {name: teacher_of(arch) for name, arch in ARCHITECTURES.items()}
    assert {n: t.name for n, t in named.items() if t} == {
        "bk-sdxl": "sdxl", "koala-1b": "sdxl", "koala-700m": "sdxl",
        "koala-mini-1b": "sdxl-mini", "koala-mini": "sdxl-mini",
    }  # fmt: skip
    own = from_unet_config(
        unet_config(ARCHITECTURES["koala-700m"]) | {"transformer_layers_per_block": [1, 2, 4]}
    )
    assert own.name == "custom"
    assert teacher_of(own) == ARCHITECTURES["sdxl"]
    assert teacher_of(TOY_STUDENT.unet) is None


def test_a_lora_of_the_students_own_is_not_moved(tmp_path):
    """It has every such module of the student, and none that only the teacher has."""
    student = base_named("koala-700m")
    file = toy_lora(
        tmp_path / "own.safetensors", student, "PEFT", lambda t: t.path.endswith("attn1.to_q")
    )
    lora = read(file, student)
    assert lora.report.made_for == "koala-700m" and not lora.report.doubt
    assert lora.report.applied == lora.report.modules


SDXL_SAID = {"ss_base_model_version": "sdxl_base_v1-0"}


@pytest.mark.parametrize("form", ["kohya", "PEFT"])
@pytest.mark.parametrize("said", [None, SDXL_SAID, {"modelspec.title": "a style"}])
def test_a_partial_lora_that_fits_both_is_sdxls_and_the_doubt_is_said(tmp_path, form, said):
    """A B-LoRA: the two blocks of content and style alone."""

    def chosen(target):
        return re.match(r"up_blocks\.0\.attentions\.[01]\..*attn1\.to_q", target.path)

    file = toy_lora(tmp_path / "b.safetensors", SDXL, form, chosen, metadata=said)
    lora = read(file, base_named("bk-sdxl"))
    assert lora.report.made_for == "sdxl"
    assert {t.path.split(".")[3] for t in lora.adapters} == {
        "0"
    }  # its second layer was SDXL's third
    doubted = said != SDXL_SAID
    assert (
        "its names fit bk-sdxl as well, and nothing in it says" in lora.report.line()
    ) == doubted
    student = convert_lora(file, "bk-sdxl", tmp_path / "c.safetensors")
    again = read(tmp_path / "c.safetensors", base_named("bk-sdxl"))  # which our own file says
    assert (again.report.made_for, again.report.doubt) == ("bk-sdxl", "")
    assert again.report.applied == student.applied


def test_what_changes_the_same_weights_either_way_is_not_doubted(tmp_path):
    file = toy_lora(
        tmp_path / "t.safetensors", SDXL, "kohya", lambda t: t.path == "time_embedding.linear_1"
    )
    assert not read(file, base_named("koala-1b")).report.doubt


# --- what stands beside, and how it is spelled ----------------------------------------------


def test_what_is_no_adapter_is_left_out_counted_and_named(tmp_path):
    file = toy_lora(tmp_path / "a.safetensors", TOY, "kohya", alpha=1)
    whole = load_file(file)
    beside = {
        "bundle_emb.mytok.clip_l": torch.zeros(2, 16),
        "bundle_emb.mytok.clip_g": torch.zeros(2, 24),
        "global_step": torch.tensor(5),
        "lora_unet_nothing.alpha": torch.tensor(1.0),
        "lora_unet_out_0.diff": torch.zeros(16),
        "lora_unet_out_0.diff_b": torch.zeros(16),
        "diffusion_model_stray": torch.zeros(1),
    }
    unknown = {
        f"lora_unet_new_module.lora_{side}.weight": torch.zeros(2, 2) for side in ("up", "down")
    }
    save_file(whole | beside | unknown, file)
    report = read(file, TOY).report
    assert report.applied == len(shapes(TOY))
    assert report.left_out == {
        "embeddings": ["bundle_emb.mytok.clip_g", "bundle_emb.mytok.clip_l"],
        "training states": ["global_step"],
        "alphas without matrices": ["lora_unet_nothing"],
        "norms": ["lora_unet_out_0.diff"],
        "biases": ["lora_unet_out_0.diff_b"],
        "other tensors": ["diffusion_model_stray"],
        "unknown modules": ["lora_unet_new_module"],
    }
    assert "embeddings (2: bundle_emb.mytok.clip_g, bundle_emb.mytok.clip_l)" in report.line()


@pytest.mark.parametrize(
    "rename",
    [
        ("unet.", "base_model.model."),
        ("unet.", "unet.base_model.model."),
        ("unet.", "base_model.model.unet."),
        (".lora_A.", ".lora_A.default."),
        (".lora_A.", ".lora_A.my_style."),
    ],
)
def test_pefts_own_names(tmp_path, rename):
    def chosen(target):
        return target.part == "unet"

    file = toy_lora(tmp_path / "a.safetensors", TOY, "PEFT", chosen)
    expected = {t: a.factors["up"].shape for t, a in read(file, TOY).adapters.items()}
    old, new = rename
    pairs = [rename, (old.replace("A", "B"), new.replace("A", "B"))] if "_A" in old else [rename]
    tensors = load_file(file)
    for old, new in pairs:
        tensors = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    assert {t: a.factors["up"].shape for t, a in read(file, TOY).adapters.items()} == expected


@pytest.mark.parametrize("prefix", ["unet.", "diffusion_model.", "model.diffusion_model."])
def test_dotted_original_names(tmp_path, prefix):
    """OneTrainer's and ComfyUI's: those of SDXL's own checkpoint."""
    tensors = {
        f"{prefix}input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_{side}.weight": matrix
        for side, matrix in (("down", torch.zeros(2, 640)), ("up", torch.zeros(640, 2)))
    } | {
        "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1"
        f".lora_{side}.weight": matrix
        for side, matrix in (("down", torch.zeros(2, 1280)), ("up", torch.zeros(5120, 2)))
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert set(read(tmp_path / "a.safetensors", SDXL).adapters) == {
        Target("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        Target("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1"),
    }


@pytest.mark.parametrize(
    "stem",
    [
        "{path}",
        "lora_unet.{path}",
        "transformer.{path}",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    ],
)
@pytest.mark.parametrize("ends", [(".lora_A", ".lora_B"), (".lora_A.weight", ".lora_B.weight")])
def test_names_with_other_prefixes_or_none(tmp_path, stem, ends):
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    matrices = (torch.zeros(2, 640), torch.zeros(640, 2))
    stem = stem.format(path=path)
    tensors = {stem + end: matrix for end, matrix in zip(ends, matrices, strict=True)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert set(read(tmp_path / "a.safetensors", SDXL).adapters) == {Target("unet", path)}


def test_processors_as_the_oldest_diffusers_saved_them(tmp_path):
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    stem = f"{block}.processor.to_out_lora"
    tensors = {f"{stem}.down.weight": torch.zeros(2, 640), f"{stem}.up.weight": torch.zeros(640, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert set(read(tmp_path / "a.safetensors", SDXL).adapters) == {
        Target("unet", f"{block}.to_out.0")
    }


def test_an_alpha_beside_a_named_adapter_is_no_second_adapter(tmp_path):
    tensors = {}
    for path in ("to_q", "to_v"):
        stem = PEFT_STEM.replace("to_q", path)
        tensors |= {
            f"{stem}.lora_A.default.weight": torch.zeros(2, 640),
            f"{stem}.lora_B.default.weight": torch.zeros(640, 2),
            f"{stem}.alpha": torch.tensor(1.0),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    adapters = read(tmp_path / "a.safetensors", SDXL).adapters
    assert [adapter.factor for adapter in adapters.values()] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("ending", "what"),
    [
        (".diff_b", "biases"),
        (".bias_values", "biases"),
        (".w_norm", "norms"),
        (".diff", "norms"),
        (".set_weight", "whole weights"),
        (".modules_to_save.default.weight", "whole weights"),
    ],
)
def test_what_changes_no_weight_is_called_what_it_is(tmp_path, ending, what):
    """Alone; beside a LoRA it is left out and counted."""
    save_file({QUERY + ending: torch.zeros(640)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"changes no weight: it holds {what} \(lora_unet"):
        read(tmp_path / "a.safetensors", SDXL)
    save_file({**tensors(), QUERY + ending: torch.zeros(640)}, tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors", SDXL).report.left_out == {what: [QUERY + ending]}


@pytest.mark.parametrize(
    ("ending", "shape", "kind"),
    [
        (".lora_E", (4, 1), "AdaLoRA"),
        (".vera_lambda_b", (640,), "VeRA"),
        (".oft_blocks", (4, 160, 160), "OFT"),
        (".oft_blocks", (3, 10, 64, 64), "BOFT"),
        (".b1.weight", (4, 640), "GLoRA"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, ending, shape, kind):
    extra = {QUERY + ending: torch.zeros(shape)}
    if kind == "GLoRA":
        extra[f"{QUERY}.a1.weight"] = torch.zeros(4, 640)
    save_file(extra, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"is {kind} .*; supported are LoRA, DoRA, LoHa, LoKr"):
        read(tmp_path / "a.safetensors", SDXL)


def test_two_adapters_in_one_file_are_refused(tmp_path):
    pair = {
        f"{PEFT_STEM}.lora_{side}.{name}.weight": tensor
        for name in ("one", "two")
        for side, tensor in (("A", torch.zeros(2, 640)), ("B", torch.zeros(640, 2)))
    }
    save_file(pair, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds several adapters"):
        read(tmp_path / "a.safetensors", SDXL)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_part_of_a_lora_is_either_applied_or_dropped(tmp_path_factory, data):
    form = data.draw(st.sampled_from([f for f in FORMS if f != "PEFT alone"]))
    unet, text = (spellings(TOY)[FORMS[form][i][0]] for i in (0, 1))
    chosen = set(data.draw(st.lists(st.sampled_from([*unet, *text]), max_size=9)))
    chosen.add(data.draw(st.sampled_from([*text])))  # which always finds a place
    file = tmp_path_factory.mktemp("part") / "a.safetensors"
    toy_lora(file, TOY, form, chosen.__contains__, alpha=1.5)
    lora = read(file, TOY_STUDENT, TOY.unet)
    dropped = sum(n for blocks in lora.report.dropped.values() for n in blocks.values())
    assert lora.report.applied + dropped == lora.report.modules == len(chosen)
    assert set(lora.adapters) <= set(shapes(TOY_STUDENT))
    assert lora.report.ranks == [2]
    assert all(adapter.factor == 0.75 for adapter in lora.adapters.values())


# --- conversion -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_converted_file_has_the_students_names_and_all_else_as_it_was(tmp_path, dtype):
    """At full size, in kohya's original spelling: values, dtype, alpha, metadata."""
    chosen = {
        Target("unet", f"up_blocks.0.attentions.{j}.transformer_blocks.{k}.attn1.to_q")
        for j in (1, 2)
        for k in (0, 9)
    } | {Target("text_encoder_2", "text_model.encoder.layers.31.mlp.fc1")}
    told = {"ss_network_dim": "4", "modelspec.title": "a test"}
    file = toy_lora(
        tmp_path / "a.safetensors", SDXL, "kohya", chosen.__contains__, rank=4, alpha=2,
        metadata=told, dtype=dtype,
    )  # fmt: skip
    report = convert_lora(file, "koala-700m", tmp_path / "b.safetensors")
    assert (report.modules, report.applied) == (5, 2)
    before, after = load_file(file), load_file(tmp_path / "b.safetensors")
    moved = {
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q": "lora_unet_output_blocks_"
        "2_1_transformer_blocks_0_attn1_to_q",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1": "lora_te2_text_model_encoder_layers_31_"
        "mlp_fc1",
    }
    endings = (".lora_down.weight", ".lora_up.weight", ".alpha")
    assert set(after) == {new + ending for new in moved for ending in endings}
    for new, old in moved.items():
        for ending in endings:
            assert after[new + ending].dtype == dtype
            assert torch.equal(after[new + ending], before[old + ending])
    assert told.items() <= read_metadata(tmp_path / "b.safetensors").items()


def test_a_file_is_converted_once(tmp_path):
    file = toy_lora(tmp_path / "a.safetensors", SDXL, "PEFT", lambda t: "layers.0.mlp" in t.path)
    for name in ("b0.safetensors", "b1.safetensors"):
        out = tmp_path / name
        convert_lora(file, "koala-1b", out)
        file = out
    assert (tmp_path / "b0.safetensors").read_bytes() == (tmp_path / "b1.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"b1\.safetensors is a file; name a new one"):
        convert_lora(file, "koala-1b", out)
    with pytest.raises(UserError, match="text encoders vary; give the folder of a model"):
        convert_lora(file, "koala-mini-1b", tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="unknown model 'koala-7b'"):
        convert_lora(file, "koala-7b", tmp_path / "c.safetensors")


# --- refusals -------------------------------------------------------------------------------

QUERY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
KEY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"


def tensors(stem: str = QUERY, width: int = 640, context: int = 640) -> dict:
    return {
        f"{stem}.lora_down.weight": torch.zeros(2, context),
        f"{stem}.lora_up.weight": torch.zeros(width, 2),
    }


PEFT_STEM = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PEFT_PAIR = {
    f"{PEFT_STEM}.lora_A.weight": torch.zeros(2, 640),
    f"{PEFT_STEM}.lora_B.weight": torch.zeros(640, 2),
}


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({f"{QUERY}.hada_w1_a": torch.zeros(1)}, "are not all there, or of two kinds"),
        ({f"{QUERY}.lokr_w1": torch.zeros(1)}, "are not all there, or of two kinds"),
        ({f"{QUERY}.dora_scale": torch.zeros(1)}, "wrong shape"),
        ({f"{PEFT_STEM}.lora_magnitude_vector": torch.zeros(1)}, "are not all there"),
        ({f"{QUERY}.on_input": torch.zeros(1)}, "is IA3 .*; supported are LoRA, DoRA, LoHa, LoKr"),
        ({f"{QUERY}.diff": torch.zeros(2, 2)}, "are not all there, or of two kinds"),
        ({"emb_params": torch.zeros(1)}, "tensors that are not part of a LoRA: emb_params"),
        ({f"{KEY}.lora_up.weight": torch.zeros(640, 2)}, f"the matrices of {KEY} are not all"),
        (tensors(KEY, context=768), "for SD 1.5, whose text embeddings are 768 wide; .* 2048"),
        (tensors(KEY, context=1024), "is a LoRA for SD 2"),
        (tensors("lora_te_text_model_encoder_layers_0_mlp_fc1"), "for SD 1.5 or SD 2 .*not for SD"),
        (tensors("lora_unet_double_blocks_0_img_attn_proj"), "is a LoRA for Flux"),
        (tensors("transformer.blocks.0.attn"), "is a LoRA for another diffusion transformer"),
        (
            {k: v for n in range(12) for k, v in tensors(f"lora_unet_blocks_{n}").items()},
            "does not fit sdxl: unknown modules: lora_unet_blocks_0, .* and 2 more$",
        ),
        (tensors(KEY, context=2048, width=320), r"wrong shape: .*, expected \[640, 2048\]"),
        (
            {**tensors(KEY, context=2048), f"{KEY}.lora_up.weight": torch.zeros(640, 3)},
            "wrong shape",
        ),
        ({f"{QUERY}.alpha": torch.zeros(2)}, "wrong shape"),
        ({f"{QUERY}.alpha": torch.tensor(float("nan"))}, "alpha of .* is nan"),
        (
            tensors("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
            "names a module twice",
        ),
        (
            {k: v.int() for k, v in tensors(KEY, context=2048).items()},
            "holds I32 tensors; they must be floats",
        ),
    ],
)
def test_what_is_no_lora_for_sdxl_is_refused_by_name(tmp_path, extra, told):
    save_file(tensors() | extra, tmp_path / "x.safetensors")
    for model in ("sdxl", "koala-700m"):
        with pytest.raises(UserError, match=told):
            read(tmp_path / "x.safetensors", base_named(model))


def test_a_folder_or_an_address_is_called_that(tmp_path):
    with pytest.raises(UserError, match=r"is a folder: name a LoRA's file; it holds no \.safe"):
        read(tmp_path, SDXL)
    (tmp_path / "lora").mkdir()  # as a training's folder has one
    (tmp_path / "lora" / "fox.safetensors").touch()
    with pytest.raises(UserError, match=r"name a LoRA's file, such as .*/lora/fox\.safetensors"):
        read(tmp_path, SDXL)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UserError, match=r"is a folder: name a LoRA's file, such as .*_weights"):
        read(tmp_path, SDXL)
    with pytest.raises(UserError, match="is an address: download the LoRA"):
        read(Path("https://example.org/a.safetensors"), SDXL)


def test_other_files_are_refused_by_name(tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="No such file"):
        read(file, SDXL)
    save_file({"conv_in.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="is not a LoRA: none of its 1 tensors is named like one"):
        read(file, SDXL)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match="truncated"):
        read(file, SDXL)
    save_file(tensors("lora_unet_middle_block_1_proj_in", 1280, 1280), file)
    with pytest.raises(UserError, match=r"modules fits; .* 0 of 1 .* dropped: 1 of the mid block"):
        read(file, base_named("koala-700m"))
    save_file(tensors(), file)
    with pytest.raises(UserError, match=r"does not fit sdxl-mini: wrong shape"):
        read(file, base_named("koala-mini"))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("no json", "is not valid JSON"),
        ("[1]", "must be a JSON object"),
        ({"unet.peft_type": "OFT"}, "of type OFT; it must be one of LORA, LOHA, LOKR"),
        ({"unet.use_dora": True}, r"is a DoRA \(use_dora\) without the magnitude of unet"),
        ({"unet.lora_alpha": "4"}, "lora_alpha is '4'; it must be a number"),
        ({"unet.alpha_pattern": [1]}, "alpha_pattern must be an object"),
        ({"unet.alpha_pattern": {"to_q.*": 4}}, r"matches no module: to_q\.\*"),
    ],
)
def test_settings_of_peft_that_cannot_be_followed_are_refused(tmp_path, config, told):
    text = config if isinstance(config, str) else json.dumps(config)
    file = tmp_path / "x.safetensors"
    save_file(PEFT_PAIR, file, {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=told):
        read(file, SDXL)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 1.0),
        ({"unet.lora_alpha": 8}, 4.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / 2**0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 1}}, 0.5),
        ({"lora_alpha": 6}, 3.0),
        ({"text_encoder.lora_alpha": 6}, 1.0),
    ],
)
def test_alpha_in_the_settings_of_peft(tmp_path, config, factor):
    file = tmp_path / "x.safetensors"
    save_file(PEFT_PAIR, file, {"lora_adapter_metadata": json.dumps(config)})
    assert [a.factor for a in read(file, SDXL).adapters.values()] == [pytest.approx(factor)]


def test_a_single_files_header_says_what_a_lora_is_for(toy_cache, tmp_path, monkeypatch):
    """Without unpacking it into the cache."""
    monkeypatch.setenv("KOALA_CACHE", str(tmp_path / "cache"))
    file = convert("koala-mini", "single-file", tmp_path / "mini.safetensors").out
    assert base_named(str(file)) == base_named("koala-mini")
    assert not list(tmp_path.glob("models*")) and not (tmp_path / "cache").exists()
