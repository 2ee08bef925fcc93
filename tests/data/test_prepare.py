"""`koala prepare` from end to end at toy size: what is written, counted, refused, and taken up."""

import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.latent_scale import LatentScale
from koala.checkpoints.load import load_vae
from koala.checkpoints.tensors import read_header
from koala.cli import main
from koala.data.captions import CaptionFitter
from koala.data.encoding import Encoder, Moments, to_pixels
from koala.data.index import Index
from koala.data.latent_preparation import prepare_latents
from koala.data.latents import LatentSet
from koala.data.prepare import facts_of, preparation_of, prepare
from koala.data.preprocess import Dropped, Filters, Preparation, Sample, upright
from koala.data.shards import shard_name
from koala.data.sources import recognise
from koala.errors import Failure, UserError
from toy_sources import LAYOUTS, caption, image, images, write_folder, write_tars, write_yepop

PREPARATION = Preparation(size=64, step=8, unit=8, held_out=0.0, captions=("text",))
NUMBER = 30


@pytest.fixture(scope="module")
def files():
    return images(NUMBER)


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures") / "there", files)


@pytest.fixture(scope="module")
def prepared(folder, toy_sdxl, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    return out, prepare_latents(recognise(folder), out, toy_sdxl, PREPARATION, workers=1)


def samples(out: Path) -> list[tuple[str, str, bytes]]:
    """(id, caption, bytes of the tensors) of every sample, by id."""
    index, found = Index(out), []
    for shard in range(len(index)):
        for row in range(int(index.rows[shard])):
            tensors = sorted(index.tensors(shard, row).items())
            content = b"".join(t.view(torch.uint8).numpy().tobytes() for _, t in tensors)
            name = index.captions[0]
            id = index.fact(shard, row, "id")
            found.append((id, index.caption(shard, row, name), content))
    return sorted(found)


def test_every_image_is_there_as_the_vae_sees_it(prepared, files, toy_sdxl):
    out, summary = prepared
    assert summary.kept == NUMBER
    assert summary.samples == {"train picture": NUMBER}
    assert sum(summary.buckets.values()) == NUMBER
    index, vae = Index(out), load_vae(toy_sdxl)
    scale = LatentScale(vae.config)
    for shard in range(len(index)):
        n = int(index.fact(shard, 0, "id").removesuffix(".jpg"))
        assert index.caption(shard, 0, "text") == caption(n)
        height, width = index.bucket(shard)
        image = upright(files[n])
        facts = {name: index.fact(shard, 0, name) for name in ("height", "width", "top", "left")}
        assert (facts["width"], facts["height"]) == image.size
        share = max(height / image.height, width / image.width)
        image = image.resize(
            (max(width, round(image.width * share)), max(height, round(image.height * share))), 1
        )
        box = (facts["left"], facts["top"], facts["left"] + width, facts["top"] + height)
        with torch.no_grad():
            posterior = vae.encode(to_pixels([image.crop(box)])).latent_dist
        stored = index.tensors(shard, 0)
        for name, own in (
            ("mean", scale.normalise(posterior.mean)),
            ("deviation", posterior.std / scale.std * scale.factor),
        ):
            assert stored[name].shape == (4, height // 8, width // 8)
            torch.testing.assert_close(stored[name].float(), own[0], atol=0.01, rtol=5e-3)


def test_a_vae_whose_posterior_is_narrow_is_not_encoded_with_in_bf16():
    """Of the bundled VAE bf16's error is a quarter of the deviation."""
    moments = Moments(BUNDLED / "koala-mini", "cpu")
    error = moments.bf16_error()
    assert 0.1 < error < 0.5 and not moments.in_bf16
    moments.vae.quant_conv.weight.data[4:] = 0  # of the logarithm of the variance
    moments.vae.quant_conv.bias.data[4:] = 4.0
    assert moments.bf16_error() < 0.1 * error


def test_shards_hold_their_samples_and_nothing_else(prepared):
    out, _ = prepared
    index = Index(out)
    assert len({index.bucket(shard) for shard in range(len(index))}) == 3
    for shard in range(len(index)):
        path = out / shard_name(int(index.unit[shard]), int(index.group[shard]))
        height, width = index.bucket(shard)
        rows, header = int(index.rows[shard]), read_header(path)
        shape = (rows, 4, height // 8, width // 8)
        assert {name: s.shape for name, s in header.items()} == {"mean": shape, "deviation": shape}
        assert path.stat().st_size < 2 * rows * 4 * (height // 8) * (width // 8) * 2 + 400
    wanted = {
        "latents",
        "units",
        "index.arrow",
        "shards.arrow",
        "plan.json",
        "latents.json",
        "probe.safetensors",
    }
    assert {p.name for p in out.iterdir()} == wanted | {"report.jsonl"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_ends_in_the_same_latents(layout, files, prepared, toy_sdxl, tmp_path):
    kind = "parquet" if layout == "parquet of paths" else None
    source = recognise(LAYOUTS[layout](tmp_path / "there", files), kind)
    text = "cogvlm_caption" if source.name == "ye-pop" else "text"
    wanted = replace(PREPARATION, captions=(text,))
    prepare_latents(source, tmp_path / "out", toy_sdxl, wanted, workers=1)
    own, theirs = samples(tmp_path / "out"), samples(prepared[0])
    assert sorted(s[1:] for s in own) == sorted(s[1:] for s in theirs)


def test_workers_and_processes_change_nothing(folder, prepared, toy_sdxl, tmp_path, monkeypatch):
    pooled, split = tmp_path / "pooled", tmp_path / "split"
    prepare_latents(recognise(folder), pooled, toy_sdxl, PREPARATION, workers=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (1, 2, 0):
        monkeypatch.setenv("RANK", str(rank))
        summary = prepare_latents(recognise(folder), split, toy_sdxl, PREPARATION, workers=1)
        assert bool(summary.units_left) == (rank != 0)  # the last one finds all done
    assert summary == prepared[1]
    for out in (pooled, split):
        for path in sorted(prepared[0].rglob("*.*")):
            assert (out / path.relative_to(prepared[0])).read_bytes() == path.read_bytes(), path


def test_what_is_left_out_is_counted_and_named(files, toy_sdxl, tmp_path):
    some = [*files[:6], files[2], image(90, (40, 40)), b"no picture", files[3][:-900], files[2]]
    root = write_folder(tmp_path / "there", some, "jsonl")
    wanted = replace(PREPARATION, filters=Filters(max_nsfw=0.45))
    summary = prepare_latents(recognise(root), tmp_path / "out", toy_sdxl, wanted, workers=1)
    assert summary.dropped == {"nsfw": 6}
    assert summary.kept == 5
    wanted = replace(PREPARATION, filters=Filters())
    out = tmp_path / "all"
    summary = prepare_latents(recognise(root), out, toy_sdxl, wanted, workers=1)
    assert summary.dropped == {"small": 1, "undecodable": 2, "duplicate": 2}
    report = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert {(line["id"], line["reason"]) for line in report} == {
        ("0006.jpg", "duplicate"), ("0010.jpg", "duplicate"), ("0007.jpg", "small"),
        ("0008.jpg", "undecodable"), ("0009.jpg", "undecodable"),
    }  # fmt: skip
    kept = {id for id, *_ in samples(out)}
    assert kept == {f"{n:04d}.jpg" for n in range(6)}
    both = replace(PREPARATION, filters=Filters(keep_duplicates=True))
    again = prepare_latents(recognise(root), tmp_path / "both", toy_sdxl, both, workers=1)
    assert again.kept == 8


def test_animated_images_are_counted(files, toy_sdxl, tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    root = write_folder(tmp_path / "there", [files[0], buffer.getvalue()])
    summary = prepare_latents(recognise(root), tmp_path / "out", toy_sdxl, PREPARATION, workers=1)
    assert (summary.kept, summary.animated) == (2, 1)
    (line,) = [line for line in summary.lines(Path("data")) if "animated" in line]
    assert line == "      1 animated or of several pages: only the first frame is read"


def test_captions_are_appended_mixed_and_counted(files, toy_sdxl, tmp_path):
    root = write_yepop(tmp_path / "there", files[:6])
    captions = ("alt_txt+cogvlm_caption", "llava_caption")
    wanted = replace(PREPARATION, captions=captions)
    out = tmp_path / "out"
    summary = prepare_latents(recognise(root), out, toy_sdxl, wanted, workers=1)
    index = Index(out)
    told = {
        index.caption(s, r, captions[0]) for s in range(len(index)) for r in range(index.rows[s])
    }
    assert told == {f"alt {n}. {caption(n)}" for n in range(6)}
    assert summary.long == dict.fromkeys(captions, 0)
    long = tmp_path / "long"
    for path in write_folder(long, files[:3]).glob("*.txt"):
        path.write_text("it is a very long caption. " * 3)
    summary = prepare_latents(recognise(long), tmp_path / "o", toy_sdxl, PREPARATION, workers=1)
    assert summary.long == {"text": 3}
    assert "shown in parts" in " ".join(summary.lines(out))


def test_a_draw_takes_half_the_bytes_and_embeddings_are_of_what_is_told(
    folder, prepared, toy_sdxl, tmp_path
):
    from koala.text_conditioning import TextConditioner

    wanted = replace(PREPARATION, posterior="draw", text=True)
    prepare_latents(recognise(folder), tmp_path, toy_sdxl, wanted, workers=1)
    index, moments = Index(tmp_path), Index(prepared[0])
    conditioner = TextConditioner.from_folder(toy_sdxl)
    errors = []
    for shard in range(len(index)):
        own, theirs = index.tensors(shard, 0), moments.tensors(shard, 0)
        assert own.keys() == {"draw", "text", "pooled"}
        errors.append(((own["draw"] - theirs["mean"]) / theirs["deviation"]).flatten())
        text, pooled = conditioner([index.caption(shard, 0, "text")])
        torch.testing.assert_close(own["text"].float(), text[0], atol=0.02, rtol=0.01)
        torch.testing.assert_close(own["pooled"].float(), pooled[0], atol=0.02, rtol=0.01)
    noise = torch.cat(errors).float()
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert 0.9 < noise.std() < 1.1


def test_images_are_stored_for_a_training_that_encodes_them(folder, prepared, toy_sdxl, tmp_path):
    """Its own VAE makes of them what `koala prepare` would have stored."""
    wanted = replace(PREPARATION, posterior="pixels")
    prepare_latents(recognise(folder), tmp_path, toy_sdxl, wanted, workers=1)
    pixels, latents = LatentSet(tmp_path, toy_sdxl), Index(prepared[0])
    stored = {
        latents.fact(shard, row, "id"): latents.tensors(shard, row)
        for shard in range(len(latents)) for row in range(latents.rows[shard])
    }  # fmt: skip
    moments = Moments(toy_sdxl, "cpu")
    for shard in range(len(pixels.index)):
        image = pixels.index.tensors(shard, 0)["pixels"]
        assert image.dtype == torch.uint8
        assert image.shape == (3, *pixels.index.bucket(shard))
        own = stored[pixels.index.fact(shard, 0, "id")]
        for found, name in zip(
            moments(image[None].float() / 127.5 - 1), ("mean", "deviation"), strict=True
        ):
            torch.testing.assert_close(found[0].bfloat16(), own[name], atol=1e-5, rtol=1e-2)
    batch = pixels.batch(0, 4)
    assert batch["pixels"].shape[:2] == (4, 3) and "latents" not in batch


# --- killed and taken up --------------------------------------------------------------------


def test_killed_twenty_times_it_ends_in_the_same_files(toy_sdxl, tmp_path):
    settings = {"size": 32, "unit": 2, "held_out": 0.1}  # many: 20 kills must come in between
    preparation = Preparation(**settings)
    there = write_tars(tmp_path / "there", images(240, [(40, 40)]), each=30)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rng = random.Random(0)
    script = Path(__file__).parents[1] / "toy_prepare.py"
    with subprocess.Popen(
        [sys.executable, str(script)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as job:
        assert job.stdin is not None and job.stdout is not None

        def begin(out: Path, workers: int) -> None:
            given = (str(there), str(out), str(toy_sdxl), settings, workers)
            job.stdin.write(json.dumps(given) + "\n")
            job.stdin.flush()

        def run(workers: int) -> int:
            begin(broken, workers)
            return int(job.stdout.readline())

        begin(whole, workers=1)
        kills = 0
        while kills < 20:
            pid = run(workers=2 if kills in (4, 12) else 1)
            before, more = len(list(broken.glob("units/*"))), rng.randrange(3)
            while len(list(broken.glob("units/*"))) < before + more:
                os.kill(pid, 0)  # it is at work, however slow the machine is
                time.sleep(0.001)
            time.sleep(rng.random() * 0.005)
            os.killpg(pid, signal.SIGKILL)
            assert os.WTERMSIG(int(job.stdout.readline())) == signal.SIGKILL
            kills += 1
            assert not (broken / "shards.arrow").exists()
        run(workers=1)
        assert int(job.stdout.readline()) == 0
    assert samples(broken) == samples(whole)
    for path in sorted(whole.rglob("*.*")):
        assert (broken / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    names = [{p.name for p in out.rglob("*")} for out in (whole, broken)]
    assert names[0] == names[1]  # and nothing half-written
    stamps = {p: p.stat().st_mtime_ns for p in whole.rglob("*.*")}
    prepare_latents(recognise(there), whole, toy_sdxl, preparation, workers=1)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*.*")} == stamps  # nothing is redone


def test_a_full_disk_fails_in_one_line_and_leaves_nothing_half_written(folder, toy_sdxl, tmp_path):
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, limits[1]))
        with pytest.raises(Failure, match="free space"):
            prepare_latents(recognise(folder), out, toy_sdxl, PREPARATION, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [p for p in out.rglob("*") if p.suffix in (".safetensors", ".arrow", ".part")]
    summary = prepare_latents(recognise(folder), out, toy_sdxl, PREPARATION, workers=1)
    assert summary.kept == NUMBER


# --- what is refused ------------------------------------------------------------------------


def test_a_folder_made_otherwise_is_refused(folder, files, prepared, toy_sdxl, tmp_path):
    out, _ = prepared
    for change, said in (
        ({"size": 128}, "size=64, now it is 128"),
        ({"filters": Filters(min_words=2)}, r"filters\.min_words=None, now it is 2"),
    ):
        with pytest.raises(UserError, match=said):
            prepare_latents(recognise(folder), out, toy_sdxl, replace(PREPARATION, **change), 1)
    more = write_folder(tmp_path / "more", [*files, image(99)])
    with pytest.raises(UserError, match="before the source changed"):
        prepare_latents(recognise(more), out, toy_sdxl, PREPARATION, 1)


def test_what_the_source_lacks_is_refused_before_the_work(folder, toy_sdxl, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "one.jpg").write_bytes(image(1))
    for place, change, said in (
        (folder, {"captions": ("title",)}, "no title; its first image has text"),
        (folder, {"filters": Filters(max_nsfw=0.5)}, "have no score nsfw"),
        (tmp_path / "bare", {"captions": ()}, r"no captions: looked for NAME\.txt, NAME\.c.*"),
    ):
        with pytest.raises(UserError, match=said):
            prepare_latents(recognise(place), out, toy_sdxl, replace(PREPARATION, **change), 1)
    assert not out.exists()
    few = replace(PREPARATION, filters=Filters(min_words=9))
    with pytest.raises(UserError, match=r"none of 30 images is left \(30 few words\)"):
        prepare_latents(recognise(folder), out, toy_sdxl, few, 1)
    large = replace(PREPARATION, size=2048)
    with pytest.raises(UserError, match="--size is 2048: give a smaller one, or --upscale, and an"):
        prepare_latents(recognise(folder), tmp_path / "large", toy_sdxl, large, 1)
    for arguments, said in (
        ({"model": None}, "give --model"),
        ({"sheet": tmp_path / "x.png"}, "leave it out"),
        ({"kind": "zip"}, "unknown kind of source .zip.: choose folder"),
        ({"workers": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(str(folder), tmp_path / "o", **{"model": str(toy_sdxl), **arguments})


def test_latents_that_are_not_finite_cost_the_images(toy_sdxl):
    pixels = np.zeros((2, 64, 64, 3), np.uint8)
    samples = [
        Sample(f"{n}.jpg", "train", "", ("a fox",), n, (64, 64), (0, 0), pixels[n]) for n in (0, 1)
    ]
    encoder = Encoder(toy_sdxl, "cpu", PREPARATION, seed=0)
    fitter = CaptionFitter.of(toy_sdxl, "sentences")
    assert [len(part) for part in encoder.unit(samples, fitter)] == [2, 0]
    encoder.moments.vae.encoder.conv_out.bias.data.fill_(float("inf"))
    assert encoder.unit(samples, fitter) == (
        [], [Dropped(f"{n}.jpg", "not finite", "latents of the VAE") for n in (0, 1)]
    )  # fmt: skip


# --- the command ----------------------------------------------------------------------------


def test_settings_that_are_given_make_a_preparation():
    assert preparation_of("folder", {"size": None, "text": False, "min_side": None}) is None
    given = {"size": 64, "captions": ["a", "b"], "mirror": True, "held_out": 0.0, "max_nsfw": 0.0}
    assert preparation_of("folder", given) == Preparation(
        64, ("a", "b"), Filters(max_nsfw=0.0), mirror=True, held_out=0.0
    )
    own = preparation_of("illustrations-small", {"mirror": True, "size": None})
    assert own == Preparation(size=128, mirror=True)
    assert preparation_of("folder", {"keep_duplicates": True}).size == Preparation().size
    with pytest.raises(UserError, match="size 500"):
        preparation_of("folder", {"size": 500})


def test_the_command_prepares_and_reports(folder, toy_sdxl, tmp_path, capsys):
    out = tmp_path / "data"
    given = ["prepare", str(folder), "--model", str(toy_sdxl), "--out", str(out), "--size", "64"]
    given += ["--workers", "1", "--caption", "text", "--held-out", "0", "--max-words", "9"]
    assert main(given) == 0
    assert f"latents of {NUMBER} images in one bucket" in capsys.readouterr().out
    assert main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latents"]["samples"] == {"train picture": NUMBER}
    assert facts_of(out)["pictures"] == NUMBER
    assert facts_of(out)["filters"]["max_words"] == 9
    table = pa.ipc.open_file(pa.memory_map(str(out / "shards.arrow"))).read_all()
    assert table["height"].to_pylist() == [64] * len(table)
    assert main([*given, "--long-captions", "chunks"]) == 2
    assert "applies to stored embeddings only; add --text" in capsys.readouterr().err


def test_a_size_that_nobody_chose_is_named_if_the_model_draws_smaller(folder, tmp_path, capsys):
    out = tmp_path / "data"
    given = ["prepare", str(folder), "--model", "koala-mini", "--out", str(out), "--workers", "1"]
    assert main([*given, "--upscale", "--max-words", "1"]) == 2  # all captions are longer
    told = "stored for 1024 pixels, koala-mini draws at 128: choose with --size"
    assert told in capsys.readouterr().err
    shutil.rmtree(out)
    assert main([*given, "--upscale", "--size", "128"]) == 0
    assert told not in capsys.readouterr().err


def test_the_pages_commands_do_what_they_say(files, toy_sdxl, tmp_path, monkeypatch, capsys):
    """docs/data.md at toy size: every command, and the lines of Python after them."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    monkeypatch.chdir(tmp_path)
    there = {
        "path/to/pictures": write_folder(tmp_path / "pictures", files[:9]),
        "path/to/laion-tars": write_tars(tmp_path / "tars", files[:9]),
        "path/to/tables": LAYOUTS["parquet of bytes"](tmp_path / "tables", files[:9]),
        "path/to/ye-pop": write_yepop(tmp_path / "ye-pop", files[:9]),
        "path/to/sdxl": toy_sdxl,
    }
    for name, place in there.items():
        page = page.replace(name, str(place))
    page = re.sub(r"--size \d+|--min-side \d+|--min-similarity [\d.]+", "", page)
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line)[1:] for line in shell.splitlines() if line.startswith("koala ")]
    assert len(commands) >= 6
    for command in commands:
        shutil.rmtree("data", ignore_errors=True)
        assert main([*command, "--size", "64", "--workers", "1"]) == 0
        assert "latents of" in capsys.readouterr().out
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict = {}
    exec(snippet.replace("128)", "4)"), found)
    assert found["batch"]["latents"].shape == (4, 4, 8, 8)
    assert found["data"].epoch_length == Index("data").summary.samples["train picture"]
