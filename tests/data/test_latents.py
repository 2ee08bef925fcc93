"""Batches: true to what was prepared, the same for any number of processes, from anywhere."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from koala.data import shard_cache
from koala.data.index import Index
from koala.data.latent_preparation import prepare_latents
from koala.data.latents import AHEAD, LatentSet
from koala.data.preprocess import Preparation
from koala.data.sampler import BatchOrder
from koala.data.sources import recognise
from koala.errors import Failure, UserError
from toy_sources import caption, images, write_folder

NUMBER = 40


@pytest.fixture(scope="module")
def folder(toy_sdxl, tmp_path_factory):
    """40 pictures of three shapes in five units."""
    there = write_folder(tmp_path_factory.mktemp("pictures") / "there", images(NUMBER))
    out = tmp_path_factory.mktemp("prepared") / "data"
    preparation = Preparation(size=64, step=8, unit=8, held_out=0.15)
    prepare_latents(recognise(there), out, toy_sdxl, preparation, workers=1)
    return out


@pytest.fixture
def copied(folder, tmp_path):
    """The folder, to be spoilt."""
    return shutil.copytree(folder, tmp_path / "copy")


def epoch(data: LatentSet) -> list[dict]:
    return [data.batch(n, 1) for n in range(data.epoch_length)]


def test_an_epoch_repeats_images_as_their_folder_says(toy_sdxl, tmp_path):
    files = images(5, [(70, 70)])
    write_folder(tmp_path / "there" / "3_fox", files[:2], "none")
    write_folder(tmp_path / "there" / "1_owl", files[2:], "none")
    preparation = Preparation(size=64, held_out=0.0)
    out = tmp_path / "data"
    made = prepare_latents(recognise(tmp_path / "there"), out, toy_sdxl, preparation, workers=1)
    assert made.samples == {"train repeated 3 times": 2, "train picture": 3}
    told = [batch["captions"][0] for batch in epoch(LatentSet(out, toy_sdxl))]
    assert sorted(told) == ["fox"] * 6 + ["owl"] * 3
    once = LatentSet(out, toy_sdxl, {"picture": 1, "repeated 3 times": 1})
    assert once.epoch_length == 5


def test_what_is_validated_comes_from_every_bucket_and_each_sample_once(folder, toy_sdxl):
    data = LatentSet(folder, toy_sdxl)
    buckets = {n["latents"].shape[2:]: 0 for n in epoch(data)}
    assert len(buckets) == 3
    for count in (1, 3, 10, 1_000):
        batches = data.stratified(count)
        told = [caption for batch in batches for caption in batch["captions"]]
        assert len(told) == len({*told}) == min(count, data.epoch_length)
        shapes = [batch["latents"].shape[2:] for batch in batches]
        assert len({*shapes}) == len(shapes) == min(count, 3)
    again = data.stratified(10)
    for ours, theirs in zip(data.stratified(10), again, strict=True):
        assert torch.equal(ours["latents"], theirs["latents"])


def test_a_small_source_holds_out_some_images(folder, toy_sdxl, tmp_path):
    there = write_folder(tmp_path / "there", images(40, [(16, 16)]))
    made = {}
    for share in (0.002, 0.0):
        out = tmp_path / str(share)
        some = Preparation(size=16, held_out=share)
        made[share] = prepare_latents(recognise(there), out, toy_sdxl, some, workers=1).samples
    assert 1 <= made[0.002]["test picture"] <= 12
    assert made[0.0] == {"train picture": 40}


def test_an_epoch_shows_every_sample_as_it_was_prepared(folder, toy_sdxl):
    data, index = LatentSet(folder, toy_sdxl), Index(folder)
    held = LatentSet(folder, toy_sdxl, split="test")
    assert 0 < held.epoch_length < 15
    assert data.epoch_length + held.epoch_length == NUMBER
    stored = {}
    for shard in index.select("train"):
        for row in range(index.rows[shard]):
            stored[index.caption(shard, row, "text")] = (shard, row)
    seen = []
    for n in range(data.epoch_length):
        batch = data.batch(n, 1)
        (told,) = batch["captions"]
        seen.append(told)
        place = stored[told]
        tensors = index.tensors(*place)
        error = (batch["latents"][0] - tensors["mean"]) / tensors["deviation"]
        assert error.abs().max() < 6  # normal noise
        facts = [index.fact(*place, name) for name in ("height", "width", "top", "left")]
        assert batch["time_ids"][0].tolist() == [*facts, *index.bucket(place[0])]
    assert sorted(seen) == sorted(stored)
    assert {*seen} < {caption(n) for n in range(NUMBER)}


def test_one_process_and_four_see_the_same_batches(folder, toy_sdxl):
    whole, shared = LatentSet(folder, toy_sdxl), LatentSet(folder, toy_sdxl)
    for first in (0, 8, 16, 80, 8):
        batch = whole.batch(first, 8)
        shares = [shared.batch(first, 8, rank, 4) for rank in range(4)]
        for name in ("latents", "time_ids"):
            assert torch.equal(torch.cat([s[name] for s in shares]), batch[name])
        assert [c for s in shares for c in s["captions"]] == batch["captions"]
        assert batch["latents"].dtype == torch.float32


def test_the_stream_has_no_state(folder, toy_sdxl):
    one, other = LatentSet(folder, toy_sdxl), LatentSet(folder, toy_sdxl)
    forwards = [one.batch(4 * n, 4) for n in range(20)]
    for n in (13, 2, 19, 0):
        again = other.batch(4 * n, 4)
        assert again["captions"] == forwards[n]["captions"]
        assert torch.equal(again["latents"], forwards[n]["latents"])
    shapes = {b["latents"].shape for b in forwards}
    assert len(shapes) > 1
    differently = LatentSet(folder, toy_sdxl, seed=1)
    assert [differently.batch(4 * n, 4)["captions"] for n in range(20)] != [
        b["captions"] for b in forwards
    ]


def test_draws_of_one_sample_differ_and_are_normal(folder, toy_sdxl):
    data, index = LatentSet(folder, toy_sdxl), Index(folder)
    draws: dict[str, list[torch.Tensor]] = {}
    for n in range(6 * data.epoch_length):
        batch = data.batch(n, 1)
        draws.setdefault(batch["captions"][0], []).append(batch["latents"][0])
    errors = []
    for shard in index.select("train"):
        tensors = index.tensors(shard, 0)
        own = draws[index.caption(shard, 0, "text")]
        assert len({t.sum().item() for t in own}) == len(own) >= 5
        errors += [((t - tensors["mean"]) / tensors["deviation"]).flatten() for t in own]
    noise = torch.cat(errors)
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert abs(noise.std() - 1) < 4 / (2 * len(noise)) ** 0.5


@pytest.mark.parametrize("posterior", ["moments", "draw", "pixels"])
def test_half_are_mirror_images_where_asked_for(posterior, toy_sdxl, tmp_path):
    """Of training pictures, and never under a caption that says left or right."""
    files = images(24, [(80, 80)])
    there = write_folder(tmp_path / "there", files)
    for n in range(0, 24, 4):
        (there / f"{n:04d}.txt").write_text(f"an owl Left of fox {n}")
    turned = write_folder(tmp_path / "turned", [mirror_image(file) for file in files])
    plain = Preparation(size=64, held_out=0.2, posterior=posterior)
    for source, name, mirror in ((there, "data", True), (turned, "turned-data", False)):
        preparation = replace(plain, mirror=mirror, held_out=0.2 if mirror else 0.0)
        out = tmp_path / name
        prepare_latents(recognise(source), out, toy_sdxl, preparation, workers=1)

    index, turned = Index(tmp_path / "data"), stored_by_id(Index(tmp_path / "turned-data"))
    own = stored_by_id(index)
    if posterior == "moments":  # a stored draw's noise follows from the file
        for id, tensors in own.items():
            assert torch.equal(tensors["mirrored_mean"], turned[id]["mean"])
            assert torch.equal(tensors["mirrored_deviation"], turned[id]["deviation"])
    name = {"moments": "mean", "draw": "draw", "pixels": "pixels"}[posterior]
    data, held = (LatentSet(tmp_path / "data", toy_sdxl, split=s) for s in ("train", "test"))
    ids = {index.caption(s, r, "text"): index.fact(s, r, "id") for s, r in rows_of(index)}
    mirrored, sided = [], 0
    for stream, epochs in ((data, 12), (held, 12)):
        for n in range(epochs * stream.epoch_length):
            batch = stream.batch(n, 1)
            (told,) = batch["captions"]
            there = {key: tensor.float() for key, tensor in own[ids[told]].items()}
            if posterior == "pixels":
                there["mirrored_pixels"] = there["pixels"].flip(-1)
            if posterior == "moments":
                rng = np.random.default_rng((0, 3, n))
                noise = rng.standard_normal(there["mean"].shape, dtype=np.float32)
                for prefix in ("", "mirrored_"):
                    there[prefix + "mean"] += there[prefix + "deviation"] * torch.from_numpy(noise)
            shown = batch["pixels" if posterior == "pixels" else "latents"][0]
            as_it_was = torch.equal(shown.float(), there[name])
            assert as_it_was or torch.equal(shown.float(), there["mirrored_" + name])
            if stream is held or "Left" in told:
                assert as_it_was
                sided += "Left" in told
            else:
                mirrored.append(not as_it_was)
    assert sided > 12
    assert abs(np.mean(mirrored) - 0.5) < 4 * 0.5 / len(mirrored) ** 0.5


def test_a_folder_from_before_mirrors_goes_on(toy_sdxl, tmp_path):
    source = recognise(write_folder(tmp_path / "there", images(4)))
    preparation = Preparation(size=64, step=8)
    done = prepare_latents(source, tmp_path / "data", toy_sdxl, preparation, workers=1)
    file = tmp_path / "data" / "latents.json"
    made = json.loads(file.read_text())
    del made["mirror"]
    file.write_text(json.dumps(made))
    assert prepare_latents(source, tmp_path / "data", toy_sdxl, preparation, workers=1) == done
    mirrored = replace(preparation, mirror=True)
    with pytest.raises(UserError, match="mirror=False, now it is True"):
        prepare_latents(source, tmp_path / "data", toy_sdxl, mirrored, workers=1)


def mirror_image(file: bytes) -> bytes:
    """Without loss, so that it is decoded to the mirrored pixels."""
    buffer = io.BytesIO()
    ImageOps.mirror(Image.open(io.BytesIO(file))).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(index: Index) -> list[tuple[int, int]]:
    return [(shard, row) for shard in range(len(index)) for row in range(index.rows[shard])]


def stored_by_id(index: Index) -> dict[str, dict[str, torch.Tensor]]:
    return {index.fact(*place, "id"): index.tensors(*place) for place in rows_of(index)}


@pytest.fixture
def bucket(folder):
    """The folder as a remote one, and the names of what is fetched from there."""
    remote = fsspec.filesystem("memory")
    remote.put(str(folder), "/bucket/data", recursive=True)
    yield remote
    remote.rm("/bucket", recursive=True)


def test_a_remote_folder_gives_the_same_and_keeps_few_shards(folder, bucket, toy_sdxl, monkeypatch):
    monkeypatch.setattr(shard_cache, "FAR_AHEAD", 2)
    far = LatentSet("memory://bucket/data", toy_sdxl, window=1)
    close = LatentSet(folder, toy_sdxl, window=1)
    for n in (*range(12), 3, 4, 20):
        own, theirs = far.batch(4 * n, 4), close.batch(4 * n, 4)
        assert torch.equal(own["latents"], theirs["latents"])
        assert own["captions"] == theirs["captions"]
    # Of three buckets one window each, of one shard, and those of the batches that are read ahead.
    assert 3 <= len(far.index.files._fetched) <= 3 + 2 * (AHEAD + 2) < len(far.index)
    scratch = Path(far.index.files._scratch.name)
    far.close()
    assert not scratch.exists()


def test_remote_shards_are_fetched_once_an_epoch_and_before_they_are_wanted(bucket, toy_sdxl):
    far = LatentSet("memory://bucket/data", toy_sdxl)
    far.batch(0, 1)
    files = far.index.files
    names = {far.index.name(shard) for shard in far.index.select("train")}
    assert files._fetched.keys() == names  # the stream is named far beyond the first batch
    for n in range(1, far.epoch_length):
        far.batch(n, 1)
    assert next(files._numbers) == len(names) + 3  # and the tables
    far.close()


def test_a_shard_that_cannot_be_fetched_is_named(bucket, toy_sdxl):
    far = LatentSet("memory://bucket/data", toy_sdxl)
    shutil.rmtree(far.index.files._scratch.name)
    Path(far.index.files._scratch.name).write_text("a file where the folder should be")
    with pytest.raises(Failure, match=r"memory://bucket/data: cannot download latents/"):
        far.batch(0, 4)
    Path(far.index.files._scratch.name).unlink()
    far.close()
    bucket.rm("/bucket/data/latents", recursive=True)
    with pytest.raises(UserError, match="shards are missing, the first is latents/000000-000"):
        LatentSet("memory://bucket/data", toy_sdxl)


def test_processes_share_out_the_shards_of_a_window():
    """Of eight processes each meets an eighth of a window's shards, and a few beside."""
    shards = np.arange(64)
    order = BatchOrder(shards, np.full(64, 100), np.zeros(64, int), seed=0)
    met: list[set[int]] = [set() for _ in range(8)]
    for number in range(6400 // 128):
        places = order.batch(number, 128)
        for rank in range(8):
            met[rank] |= {shard for shard, _ in places[16 * rank : 16 * (rank + 1)]}
    assert max(map(len, met)) < 24  # of 64


def test_what_is_missing_or_not_finite_is_named(copied, toy_sdxl):
    shard = sorted(copied.glob("latents/*"))[3]
    tensors = load_file(shard)
    tensors["mean"][0, 0, 0, 0] = torch.nan
    save_file(tensors, shard)
    data = LatentSet(copied, toy_sdxl)
    with pytest.raises(Failure, match=rf"00\d\d.jpg in latents/{shard.name} has NaN or infinite"):
        epoch(data)
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{shard.name} is truncated"):
        epoch(LatentSet(copied, toy_sdxl))
    shard.unlink()
    with pytest.raises(UserError, match=f"1 shards are missing, the first is latents/{shard.name}"):
        LatentSet(copied, toy_sdxl)


def test_what_a_training_cannot_use_is_refused(folder, copied, toy_sdxl):
    for given, said in (
        ({"size": 128}, "holds latents for 64 pixels, this training is for 128"),
        ({"split": "validation"}, "no samples of the split validation; .* train picture"),
        ({"mix": {"photo": 1}}, "of the kinds photo; .*: mix those, .* mixture.kinds=picture:1$"),
        (
            {"captions": {"title": 1.0}},
            "no captions title; there are text: weigh those, as in --set mix",
        ),
        ({"captions": {"text": 0.0}}, "give each a weight"),
        ({"long_captions": "cut"}, "sentences, chunks"),
    ):
        with pytest.raises(UserError, match=said):
            LatentSet(folder, toy_sdxl, **given)
    (copied / "shards.arrow").unlink()
    with pytest.raises(UserError, match="is not completely prepared"):
        LatentSet(copied, toy_sdxl)
    (copied / "latents.json").unlink()  # as a folder of images
    with pytest.raises(UserError, match="is no folder that koala prepare made: koala prepare IM"):
        LatentSet(copied, toy_sdxl)


def test_opening_reads_no_rows(folder, toy_sdxl):
    """Twice: the shard table, which has a row a shard; nothing that has a row a sample."""
    data = LatentSet(folder, toy_sdxl)
    assert data.index._batches.cache_info().misses == 0
    assert len(data.index) == len(list(folder.glob("latents/*")))
    assert int(np.sum(data.index.rows)) == NUMBER
