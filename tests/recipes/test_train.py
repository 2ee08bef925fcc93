"""The whole chain at toy size, through the commands' own functions: pictures -> base -> teacher ->
student -> pictures drawn."""

import itertools
import json
from dataclasses import fields, is_dataclass, replace

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from koala import recipes
from koala.checkpoints import model_card
from koala.checkpoints.load import load_unet, load_vae
from koala.cli import main
from koala.data.encoding import encoder_hash, to_pixels
from koala.data.illustrations.images import ImageSet
from koala.distillation.settings import Hardware
from koala.errors import UserError
from koala.generation import load
from koala.generation.pruning import prune_model
from koala.mini.text import TextDistillation, clip_tokenizer, new_text_encoders
from koala.mini.vae import Autoencoding, ImageData, measure_latents, new_vae, to_images
from koala.recipes.recipe import Mixture, Student, described
from koala.recipes.train import distill, finetune
from toy_family import TINY, Letters
from toy_sources import images, prepared, write_folder


@pytest.fixture(autouse=True)
def one_prompt(monkeypatch):
    """Previews take most of a toy run's time: one image is enough."""
    monkeypatch.setattr("koala.recipes.build.MINI_PROMPTS", ("a fox",))


def test_the_whole_chain(base_parts, tmp_path, packages):
    data, base = base_parts
    first = replace(recipes.get("sdxl-mini-64"), training=TINY)
    begun = distill(first, data, tmp_path / "first", str(base), "cpu")
    teacher = replace(recipes.get("sdxl-mini"), training=replace(TINY, lr=1e-30))
    master = distill(teacher, data, tmp_path / "teacher", str(begun), "cpu")
    unet = "unet/diffusion_pytorch_model.safetensors"  # goes on from its weights: no step moves any
    assert_close(load_file(master / unet), load_file(begun / unet), rtol=0, atol=1e-7)
    assert not torch.equal(*(load_file(m / unet)["conv_in.weight"] for m in (base, begun)))
    student = replace(recipes.get("koala-mini"), training=TINY, prompts=("a fox",))
    small = distill(student, data, tmp_path / "student", str(master), "cpu")
    lines = (tmp_path / "student" / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["samples"] for line in lines] == [4, 8]
    assert {"task", "out", "feat", "loss"} <= json.loads(lines[0]).keys()
    assert list((tmp_path / "student" / "previews").glob("*.png"))
    before = load_file(tmp_path / "student" / "start/unet/diffusion_pytorch_model.safetensors")
    after = load_file(small / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    image = load(small)("a fox", steps=2, seed=1).images[0]
    assert image.size == (64, 64), "the data's size, which its teacher was trained at"
    told = model_card.read(small)
    assert (told.title, told.cut.teacher, told.trained.teacher) == ("student", "teacher", "teacher")
    assert told.trained.samples == {"U-Net": 8} and told.trained.distilled
    assert not model_card.read(master).trained.distilled

    again = distill(student, data, tmp_path / "student", str(master), "cpu")  # finished: no step
    assert all(
        torch.equal(v, load_file(again / "unet/diffusion_pytorch_model.safetensors")[k])
        for k, v in after.items()
    )
    assert (tmp_path / "student" / "stats.jsonl").read_text().splitlines() == lines
    master_too = (str(master), "cpu")
    more = distill(student, data, tmp_path / "more", *master_too, student=str(small))
    begun_as = load_file(tmp_path / "more" / "start" / unet)
    assert all(torch.equal(begun_as[k], after[k]) for k in after)
    trained = model_card.read(more).trained
    assert (trained.student, trained.before, trained.samples) == ("student", 8, {"U-Net": 8})
    with pytest.raises(UserError, match="student='student', now it is None"):
        distill(student, data, tmp_path / "more", *master_too)
    with pytest.raises(UserError, match="--student x: this recipe trains no student"):
        distill(teacher, data, tmp_path / "none", *master_too, student="x")
    other = replace(student, training=replace(TINY, lr=2e-3))
    with pytest.raises(UserError, match="lr"):
        distill(other, data, tmp_path / "student", str(master), "cpu")
    guided = replace(recipes.get("koala-mini-guided"), training=TINY, prompts=("a fox",))
    unguided = distill(guided, data, tmp_path / "guided", *master_too, student=str(small))
    with pytest.raises(UserError, match=r"teacher .* is made to be drawn without guidance"):
        distill(guided, data, tmp_path / "again", str(unguided), "cpu")

    grown = distill(teacher, data, tmp_path / "grown", str(small), "cpu")
    assert load(grown)("a fox", steps=2, seed=1).images[0].tobytes() == image.tobytes()
    told = model_card.read(grown)
    assert (told.cut, told.trained.further, told.trained.distilled) == (None, "student", False)
    assert told.trained.grown and told.trained.before == 8
    assert (
        "its U-Net grown from that of student, trained further" in (grown / "README.md").read_text()
    )
    longer = distill(teacher, data, tmp_path / "longer", str(grown), "cpu")
    assert "its U-Net that of grown, trained further" in (longer / "README.md").read_text()
    deeper = replace(teacher, architecture="sdxl")
    with pytest.raises(UserError, match=r"koala-mini, but this recipe continues sdxl: .* a cut"):
        distill(deeper, data, tmp_path / "further", str(small), "cpu")


def test_a_pruned_model_is_distilled_and_fine_tuned(base_parts, tmp_path, packages):
    data, base = base_parts
    pruned = prune_model(base, 0.3, ["a fox"], tmp_path / "pruned").out
    still = replace(TINY, lr=1e-30)
    asked = replace(recipes.get("koala-mini-sa"), cut=None, training=still, prompts=("a fox",))
    run = tmp_path / "distilled"
    distilled = distill(asked, data, run, str(base), "cpu", student=str(pruned))
    full = recipes.get("full", recipes.FINETUNES)
    short = Mixture(captions={"short": 1.0})
    full = replace(full, training=still, hardware=Hardware(), mixture=short, prompts=("a fox",))
    tuned = finetune(full, str(distilled), data, tmp_path / "tuned", "cpu")
    start, *trained = (load_unet(folder) for folder in (pruned, distilled, tuned))
    for unet in trained:  # as narrow as it was, and no step moved a weight
        assert unet.config["inner_widths"] == start.config["inner_widths"] != {}
        assert_close(dict(unet.state_dict()), dict(start.state_dict()), rtol=0, atol=1e-6)
    stats = (run / "stats.jsonl").read_text().splitlines()
    assert json.loads(stats[-1])["feat"] > 0
    again = replace(asked, cut="koala-700m")
    with pytest.raises(UserError, match=r"this recipe trains koala-mini: add --set cut=none"):
        distill(again, data, tmp_path / "none", str(base), "cpu", student=str(pruned))


def test_a_vae_goes_on_and_nothing_else_changes(base_parts, tmp_path, packages):
    data, base = base_parts
    made = distill(
        replace(recipes.get("mini-vae"), training=TINY), data, tmp_path, str(base), "cpu"
    )
    for file in base.rglob("*.safetensors"):
        before, after = load_file(file), load_file(made / file.relative_to(base))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == (set(before) if file.parent.name == "vae" else set())
    assert encoder_hash(made) != encoder_hash(base)  # so latents of before are refused
    assert model_card.read(made).trained == model_card.read(base).trained
    vae, real = load_vae(made), ImageSet(data)
    pixels = to_pixels([real.image(i) for i in real.select("train")])
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    deviation = torch.tensor(vae.config.latents_std)  # of the mixture, which shows emoji oftener
    assert_close(deviation, latents.std((0, 2, 3)), rtol=0.2, atol=0)


def test_noise_on_latents_is_in_their_deviations(packages):
    vae, shown = new_vae(64), torch.zeros(2, 3, 64, 64)
    task = Autoencoding(vae, shown, drift=0.5)
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([1.0, 2.0, 4.0, 8.0])
    latents = 9 + deviations[:, None, None] * torch.randn(4_000, 4, 4, 4, generator=generator)
    noise = task._drifts(latents, generator)
    # a uniform share of 0.5 has a root mean square of 0.5 / sqrt(3)
    expected = deviations * 0.5 / 3**0.5
    assert_close(noise.square().mean((0, 2, 3)).sqrt(), expected, rtol=0.03, atol=0)
    assert Autoencoding(vae, shown)._drifts(latents, generator) == 0


def test_data_may_lie_elsewhere(base_parts, tmp_path, packages):
    data, base = base_parts
    remote = fsspec.filesystem("memory")
    remote.put(str(data), "/family/data", recursive=True)
    given = ["--set", "training.samples=4", "training.batch=4", "training.warmup=0"]
    command = ["distill", "sdxl-mini-64", "--teacher", str(base), "--device", "cpu", *given]
    for name, place in (("far", "memory://family/data"), ("near", str(data))):
        assert main([*command, "--data", place, "--out", str(tmp_path / name)]) == 0
    file = "model/unet/diffusion_pytorch_model.safetensors"
    far, near = (load_file(tmp_path / name / file) for name in ("far", "near"))
    assert all(torch.equal(far[name], value) for name, value in near.items())
    assert model_card.read(tmp_path / "far/model").trained.data["pictures"] > 0
    remote.rm("/family", recursive=True)


def test_images_are_encoded_on_line(base_parts, tmp_path, packages):
    """The same run from latents and from pictures, but for the draws and bf16."""
    _, base = base_parts
    source = write_folder(tmp_path / "pictures", images(8, [(70, 70)]))
    recipe = replace(recipes.get("sdxl-mini-64"), training=TINY, mixture=Mixture())
    losses = {}
    for name, given in (("latents", []), ("pixels", ["--pixels"])):
        data = prepared(source, base, tmp_path / name, "--held-out", "0", *given)
        distill(recipe, data, tmp_path / f"{name}-run", str(base), "cpu")
        line = (tmp_path / f"{name}-run" / "stats.jsonl").read_text().splitlines()[0]
        losses[name] = json.loads(line)["task"]
    assert losses["pixels"] == pytest.approx(losses["latents"], rel=0.05)


def test_what_distill_refuses(base_parts, tmp_path, packages):
    data, base = base_parts
    for recipe, teacher, said in (
        ("koala-huge", str(base), "koala-mini-task"),
        ("koala-mini", None, "--teacher"),
        ("mini-base", str(base), "leave it out"),
        ("koala-mini", str(tmp_path), "no model_index.json"),
    ):
        with pytest.raises(UserError, match=said):
            distill(recipe, data, tmp_path / "run", teacher, "cpu")
    no_kinds = Student(
        cut="koala-700m",
        training=TINY,
        settings=recipes.get("koala-mini").settings,
        mixture=Mixture({"photograph": 1}, {"short": 1.0}),
    )
    with pytest.raises(UserError, match="photograph"):
        distill(no_kinds, data, tmp_path / "run2", str(base), "cpu")
    decoder = replace(recipes.get("mini-vae"), kinds={"emoji": 0, "photograph": 3})
    with pytest.raises(UserError, match=r"no training images for an epoch of .*'photograph': 3"):
        distill(decoder, data, tmp_path / "run3", str(base), "cpu")
    assert not list(tmp_path.iterdir())


def as_json(value):
    """What JSON makes of a recipe or a part of one, field by field."""
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    return [as_json(part) for part in value] if isinstance(value, tuple | list) else value


def test_recipes_describe_all_that_they_hold_and_no_two_are_the_same():
    shown = []
    for name in recipes.NAMES:
        recipe = recipes.get(name)
        shown.append(json.loads(json.dumps(described(recipe))))
        assert shown[-1] == {type(recipe).__name__.lower(): as_json(recipe)}, name
    assert all(a != b for a, b in itertools.combinations(shown, 2))


def test_the_controls_differ_from_the_student_in_their_losses_alone():
    student, task, out = (
        recipes.get(n) for n in ("koala-mini-sa", "koala-mini-task", "koala-mini-task-out")
    )
    for control in (task, out):
        assert replace(control, settings=student.settings) == student
    assert task.settings.output_weight == task.settings.feature_weight == 0
    assert out.settings.output_weight == 1
    assert out.settings.feature_weight == 0


def test_vae_learns_and_its_latents_are_normal(base_parts, packages):
    from koala.data.illustrations.images import ImageSet
    from koala.distillation.forward_process import generators_at

    data, _ = base_parts
    images = ImageSet(data)
    stream = ImageData(images, images.select("train"), seed=0)
    torch.manual_seed(0)
    task = Autoencoding(new_vae(64), stream.every(20))
    optimizer = torch.optim.Adam(task.trainable.parameters(), 2e-3)
    seen = []
    for step in range(12):
        loss = task.losses(stream.batch(4 * step, 4), generators_at(0, step, 1))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert sum(seen[-3:]) < 0.8 * sum(seen[:3])
    pixels = stream.every(3)
    measure_latents(task.trainable, pixels)
    mean, std = (
        torch.tensor(task.trainable.config[k]).view(1, 4, 1, 1)
        for k in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        latents = (task.trainable.encode(pixels).latent_dist.mode() - mean) / std
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-2, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)
    assert to_images(pixels)[1].tobytes() == to_images(pixels[1:2])[0].tobytes()


def test_text_side_learns_and_is_read_by_clips_tokenizer(packages):
    tokenizer = clip_tokenizer()
    assert tokenizer.tokenize("red foxx owl") == ["red</w>", "fo", "x", "x</w>", "owl</w>"]
    torch.manual_seed(0)
    encoders = new_text_encoders(tokenizer)
    task = TextDistillation(encoders, tokenizer, Letters())
    optimizer = torch.optim.Adam(task.trainable.parameters(), 3e-3)
    batch = {"texts": ["a red fox", "an owl", "two cars", "a car and an owl"]}
    seen = []
    for _ in range(15):
        losses = task.losses(batch, [])
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(losses)
    for name in ("text", "word"):
        assert seen[-1][name] < 0.5 * seen[0][name]
