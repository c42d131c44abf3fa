"""The embedding pipeline with a real open_clip model of tiny size, over folders and packed files."""

import copy
import dataclasses
import errno
import io
import json
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from surf import config, store
from surf import embed as module
from surf.embed import embed
from surf.errors import SurfError
from surf.images import Images
from surf.models import clip, jpeg, pipeline
from surf.telemetry import Clock, Meter

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    whole = {"model_cfg": CLIP, "preprocess_cfg": {"mean": list(mean), "std": list(std)}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    torch.manual_seed(0)
    model = open_clip.CLIP(**{key: dict(value) if isinstance(value, dict) else value for key, value in CLIP.items()})
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def noise(seed, size=(40, 48), kind="PNG", **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photograph():
    """Bytes of a real photograph, 512x600."""
    import matplotlib

    return (Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg").read_bytes()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        (folder / f"{number}.png").write_bytes(noise(number))
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


def catalog(*names):
    return store.table_of([{"image_id": n, "image": name, "caption": "x"} for n, name in enumerate(names)], "catalog")


def encoder(clip_folder, *roots, **options):
    section = config.Embed(**{"model": f"local-dir:{clip_folder}", "pretrained": None, "workers": 2, **options})
    return clip.load(section, Images([str(root) for root in roots]))


def partial(tmp_path, **depends_on):
    return store.Partial(tmp_path / "part-00000-of-00001.parquet", "embeddings", **depends_on)


def pack(path, names, pictures, group=3):
    table = pa.table({"image": names, "bytes": pa.array([(pictures / name).read_bytes() for name in names], pa.binary())})
    pq.write_table(table, path, row_group_size=group)
    return path


def test_embeddings_are_open_clips_own_and_unit_length(clip_folder, pictures, tmp_path):
    import open_clip
    import torch

    names = [f"{number}.png" for number in range(4)]
    vectors, errors = encoder(clip_folder, pictures, batch_size=4).encode(names)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(pictures / name).convert("RGB")) for name in names])
        expected = torch.nn.functional.normalize(model.eval().encode_image(batch), dim=-1).numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert errors == {}
    table, _ = embed(catalog(*names), encoder(clip_folder, pictures, batch_size=4), partial(tmp_path))
    assert table["image_id"].to_pylist() == list(range(4))
    assert (np.array(table["embedding"].to_pylist()) == vectors.astype(np.float16)).all()


def test_a_bad_image_is_null_and_named_and_batches_change_no_bit(clip_folder, pictures, tmp_path):
    names = ["0.png", "broken.png", "1.png", "missing.png", *[f"{n}.png" for n in range(2, 9)]]
    model = encoder(clip_folder, pictures, batch_size=4)
    table, errors = embed(catalog(*names), model, partial(tmp_path / "a"))
    assert sorted(errors) == ["broken.png", "missing.png"] and "no such image" in errors["missing.png"]
    assert [row is None for row in table["embedding"].to_pylist()] == [name in errors for name in names]
    for start in (0, 3, 6):
        piece, _ = embed(catalog(*names[start:]), model, partial(tmp_path / f"b{start}"))
        assert piece["embedding"].to_pylist() == table["embedding"].to_pylist()[start:]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_packed_files_are_read_group_by_group_and_give_the_same_bits(clip_folder, pictures, tmp_path, monkeypatch, workers):
    names = [f"{number}.png" for number in range(20)]
    order = np.random.default_rng(0).permutation(20).tolist()
    first = pack(tmp_path / "a.parquet", [names[n] for n in order[:14]], pictures)
    second = pack(tmp_path / "b.parquet", [names[n] for n in order[14:]], pictures)
    group = pq.ParquetFile.read_row_group
    log = tmp_path / "groups"

    def read(self, number, **options):
        with open(log, "a") as file:
            file.write(f"{options['columns']} {self.metadata.num_rows} {number}\n")
        return group(self, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    vectors, errors = encoder(clip_folder, first, second, batch_size=4, workers=workers).encode(names)
    lines = log.read_text().splitlines()
    assert errors == {} and len(set(lines)) == 7
    assert len(lines) <= 7 + max(0, workers - 1), "each row group once, but for those where the stretches of two processes meet"
    assert (vectors == encoder(clip_folder, pictures, batch_size=4).encode(names)[0]).all()


@pytest.mark.parametrize(("count", "hands"), [(0, 1), (1, 1), (5, 2), (7, 3), (9, 3), (64, 16), (79, 16)])
def test_every_process_gets_a_stretch_of_the_order(count, hands):
    dealt = pipeline._dealt([[number] for number in range(count)], hands)
    assert sorted(dealt) == [[number] for number in range(count)]
    for hand in range(hands):
        own = [number for (number,) in dealt[hand::hands]]
        assert own == list(range(own[0], own[0] + len(own))) if own else count < hands or count == 0


@pytest.mark.parametrize("flush", [4, 100])
def test_embedding_goes_on_where_it_was_killed(clip_folder, pictures, tmp_path, monkeypatch, flush):
    monkeypatch.setattr(module, "FLUSH", flush)
    names = [f"{n}.png" for n in range(10)]
    model = encoder(clip_folder, pictures, batch_size=4)
    whole, _ = embed(catalog(*names), model, partial(tmp_path / "whole"))
    asked = []

    class Killed:
        dim, meter = model.dim, model.meter

        def stream(self, names):
            for numbers, vectors, bad in model.stream(names):
                if len(asked) == 8 and "killed" not in asked:
                    asked.append("killed")
                    raise KeyboardInterrupt
                asked.extend(names[number] for number in numbers)
                yield numbers, vectors, bad

    with pytest.raises(KeyboardInterrupt):
        embed(catalog(*names), Killed(), partial(tmp_path))
    assert partial(tmp_path).read().num_rows == 8, "those at hand were saved before it ended"
    again, _ = embed(catalog(*names), Killed(), partial(tmp_path))
    assert again.equals(whole)
    assert asked.count("0.png") == 1 and asked.count("9.png") == 1


def test_a_save_that_fails_ends_the_stage_before_the_last_image(clip_folder, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FLUSH", 1)
    model = encoder(clip_folder, pictures, batch_size=1)
    own, done = partial(tmp_path), []

    def full(table):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Slow:
        dim, meter = model.dim, model.meter

        def stream(self, names):
            for batch in model.stream(names):
                done.append(batch)
                time.sleep(0.05)
                yield batch

    monkeypatch.setattr(own, "save", full)
    with pytest.raises(OSError, match="No space left"):
        embed(catalog(*(f"{n}.png" for n in range(10))), Slow(), own)
    assert len(done) < 10


def test_an_image_that_is_neither_embedded_nor_bad_is_no_null(clip_folder, pictures, tmp_path):
    """Its saved rows went while the job was at work: another job had finished the part."""
    table = catalog("1.png", "2.png", "gone.png")
    whole, errors = embed(table, encoder(clip_folder, pictures), partial(tmp_path))
    assert whole["embedding"].null_count == 1 and list(errors) == ["gone.png"]
    with pytest.raises(SurfError, match="its saved rows are gone"):
        module.collect(table, whole.slice(1, 1), errors, tmp_path / "part.parquet")


def test_vectors_that_are_no_numbers_stop_the_stage(clip_folder, pictures):
    import torch

    model = encoder(clip_folder, pictures)
    with torch.no_grad():
        model.model.visual.proj.fill_(float("nan"))
    model.model.encode_text = lambda tokens: torch.full((len(tokens), 16), float("inf"))
    for ask in (lambda: model.encode(["1.png"]), lambda: model.encode_texts(["a dog"])):
        with pytest.raises(SurfError, match=r"NaN or infinity.*next: check its weights, or set embed\.precision"):
            ask()


def test_pickled_clip_weights_are_refused_unread(clip_folder, pictures, tmp_path):
    import torch
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "open_clip_config.json").write_bytes((clip_folder / "open_clip_config.json").read_bytes())
    torch.save(load_file(clip_folder / "open_clip_model.safetensors"), pickled / "open_clip_pytorch_model.bin")
    images = Images([str(pictures)])
    tag = config.Embed(model="ViT-B-32", pretrained=str(pickled / "open_clip_pytorch_model.bin"))
    for section in (config.Embed(model=f"local-dir:{pickled}", pretrained=None), tag):
        with pytest.raises(SurfError, match="a pickle could run code, so surf reads none"):
            clip.load(section, images)


def test_unknown_clip_is_told(pictures):
    with pytest.raises(SurfError, match=r"embed\.model = 'ViT-XXL-99'"):
        clip.load(config.Embed(model="ViT-XXL-99", pretrained=None), Images([str(pictures)]))


def test_a_broken_disk_ends_the_pipeline(clip_folder, pictures, tmp_path, monkeypatch):
    names = [f"{number}.png" for number in range(20)]
    model = encoder(clip_folder, pack(tmp_path / "a.parquet", names, pictures), batch_size=4)

    def fail(self, number, **options):
        raise OSError("Input/output error")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(OSError, match="Input/output error"):
        model.encode(names)
    assert multiprocessing.active_children() == []


def test_a_consumer_that_stops_leaves_no_process_and_no_thread_behind(clip_folder, pictures):
    stream = encoder(clip_folder, pictures, batch_size=2).stream([f"{number}.png" for number in range(20)])
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pixels")]


def test_a_signal_to_the_stage_ends_its_processes_and_is_theirs_no_more(clip_folder, pictures):
    stream = encoder(clip_folder, pictures, batch_size=2).stream([f"{number}.png" for number in range(20)])
    next(stream)
    processes = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGUSR1):  # as a terminal or Slurm sends them, to all processes of a job
        for process in processes:
            os.kill(process.pid, number)
    next(stream)
    assert all(process.is_alive() for process in processes)
    with pytest.raises(SystemExit):
        stream.throw(SystemExit(143))
    assert not any(process.is_alive() for process in processes)


def test_a_process_that_is_killed_ends_the_stage_with_a_reason(clip_folder, pictures, monkeypatch):
    decode = pipeline.Decoder.pixels

    def killed(self, data):
        if data == (pictures / "9.png").read_bytes():
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
        return decode(self, data)

    monkeypatch.setattr(pipeline.Decoder, "pixels", killed)
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(SurfError, match=r"process that decodes was ended \(exit code -9.*next: fewer embed\.workers"):
        encoder(clip_folder, pictures, batch_size=2).encode([f"{number}.png" for number in range(20)])
    assert multiprocessing.active_children() == [] and signal.getsignal(signal.SIGCHLD) is handler


def test_no_more_processes_than_shared_memory_is_enough_for(clip_folder, pictures, monkeypatch, caplog):
    names = [f"{number}.png" for number in range(20)]
    expected = encoder(clip_folder, pictures, batch_size=4).encode(names)[0]
    piece = 4 * 32 * 32 * 3
    for free, left in ((9 * piece, 2), (5 * piece, 1), (piece, 0)):
        monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path, free=free: mock.Mock(free=free))
        assert pipeline._fitting(2, piece) == left
        assert (encoder(clip_folder, pictures, batch_size=4).encode(names)[0] == expected).all()
    assert "--shm-size" in caplog.text


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(clip_folder, pictures, precision):
    names = [f"{number}.png" for number in range(4)]
    exact, half = (encoder(clip_folder, pictures, batch_size=4, precision=p).encode(names)[0] for p in ("fp32", precision))
    assert (exact * half).sum(1).min() > 0.999


def test_a_compiled_model_gives_the_same_vectors(clip_folder, pictures, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "compile", lambda function, mode: calls.append(mode) or function)
    calls = []
    encoder(clip_folder, pictures, batch_size=4, compile="reduce-overhead")
    encoder(clip_folder, pictures, batch_size=4)
    assert calls == ["reduce-overhead"]


# --- the image tower -----------------------------------------------------------------------------------------------------


def towers(precision, width=64, layers=3):
    """(open_clip's tower, the same one rebuilt), with weights that spread as trained ones do, and pixels for both."""
    import open_clip
    import torch

    from surf.models import tower

    torch.manual_seed(1)
    vision = {"image_size": 32, "layers": layers, "width": width, "head_width": 32, "patch_size": 8}
    plain = open_clip.CLIP(32, vision, dict(CLIP["text_cfg"])).visual.eval()
    own = copy.deepcopy(plain)
    if precision == "fp8":
        plain, own = plain.bfloat16(), own.bfloat16()
    tower.rebuild(own, precision)
    return plain, own, torch.randn(6, 3, 32, 32, dtype=next(plain.parameters()).dtype)


def test_rebuilt_tower_is_open_clips_tower():
    import torch

    plain, own, pixels = towers("fp32")
    assert not any(isinstance(part, torch.nn.MultiheadAttention) for part in own.modules())
    with torch.inference_mode():
        torch.testing.assert_close(own(pixels), plain(pixels), rtol=1e-4, atol=1e-5)


def test_eight_bits_change_little():
    import torch

    from surf.models import tower

    plain, own, pixels = towers("fp8")
    assert sum(isinstance(part, tower.Linear8) for part in own.modules()) == 3 * 4
    with torch.inference_mode():
        cosine = torch.nn.functional.cosine_similarity(own(pixels).float(), plain(pixels).float())
        alone = own(pixels[:1])
    assert (cosine > 0.995).all() and not torch.equal(own(pixels), plain(pixels))
    torch.testing.assert_close(alone, own(pixels)[:1])  # a row's scale is its own: neighbours change nothing


def test_eight_bits_need_a_tower_that_is_known():
    import torch

    from surf.models import tower

    with pytest.raises(SurfError, match=r"embed\.precision: fp8.*bf16"):
        tower.rebuild(torch.nn.Sequential(torch.nn.Linear(2, 2)), "fp8")


# --- fast decoding -----------------------------------------------------------------------------------------------------


def tensor(data):
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def exact(data, size):
    """open_clip's own pixels, uint8 [size, size, 3]."""
    from torchvision import transforms

    crop = transforms.Compose([transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)])
    return np.asarray(crop(Image.open(io.BytesIO(data)).convert("RGB"))).astype(np.float32)


@pytest.mark.parametrize("size", [224, 96])
def test_fast_pixels_of_a_real_photograph_are_close(photograph, size):
    """By a decoder that reduces, and by the one that runs on the GPU (here: on the CPU, the same code)."""
    from torchvision import transforms

    crop = transforms.Compose([transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)])
    draft = pipeline.Decoder(Images([]), crop, (size, size), draft=True).pixels(photograph)
    (gpu,) = jpeg.decode([tensor(photograph)], (size, size), "cpu")
    for pixels, most in ((draft, 3.0), (gpu.numpy(), 1.0)):
        assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels - exact(photograph, size)).mean() < most, "grey levels of 255"


def test_bad_files_do_not_spoil_the_good_ones(photograph):
    files = [photograph, b"\xff\xd8 no jpeg \xff\xd9", noise(1, (50, 70), "JPEG"), photograph[:2000], photograph]
    files = [tensor(data) for data in files]
    found = jpeg.decode(files, (32, 32), "cpu")
    assert found[1] is None
    for one, file in zip(found, files, strict=True):
        assert one is None or (one == jpeg.decode([file], (32, 32), "cpu")[0]).all()
    assert [found[place] is not None for place in (0, 2, 4)] == [True] * 3
    assert jpeg.decode([], (32, 32), "cpu") == []


def test_only_plain_whole_jpegs_are_left_to_the_gpu(photograph):
    turned = Image.new("RGB", (40, 20)).getexif()
    turned[0x0112] = 6
    cmyk = io.BytesIO()
    Image.new("CMYK", (40, 20)).save(cmyk, "JPEG")
    grey = io.BytesIO()
    Image.new("L", (40, 20)).save(grey, "JPEG")
    assert jpeg.suits(photograph, 10**6) and jpeg.suits(grey.getvalue(), 10**6) and jpeg.suits(photograph + b"\0\0", 10**6)
    refused = (
        photograph[:5000],
        noise(1),
        noise(1, kind="JPEG", exif=turned),
        cmyk.getvalue(),
        b"",
        b"\xff\xd8 no jpeg \xff\xd9",
    )
    assert not any(jpeg.suits(data, 10**6) for data in refused)
    assert not jpeg.suits(photograph, 512 * 600 - 1)


def test_the_files_themselves_say_which_of_them_the_gpu_decodes(clip_folder, pictures, monkeypatch):
    monkeypatch.setattr(jpeg, "available", lambda: True)
    files = [noise(seed, (16, 16), "JPEG") for seed in range(400)]
    for share in (0.0, 0.3, 1.0):
        first, again = (encoder(clip_folder, pictures, decode="gpu", gpu_share=share).decoder.on_gpu for _ in range(2))
        left = [first(file) for file in files]
        assert left == [again(file) for file in files] and abs(sum(left) / len(files) - share) < 0.1


def test_what_the_gpu_leaves_is_decoded_by_pillow(clip_folder, photograph, tmp_path):
    """The GPU's part of the work, on the CPU: one file that its decoder refuses, one that nobody can read, one good one."""
    good, odd = noise(2, (40, 40)), noise(3, (40, 40))  # the odd one is a PNG, as if it had looked like a JPEG
    for name, data in {"good": good, "photograph": photograph, "odd": odd, "nothing": b"nothing"}.items():
        (tmp_path / name).write_bytes(data)
    model = encoder(clip_folder, tmp_path, batch_size=8, decode="gpu")
    decoder = dataclasses.replace(model.decoder, on_gpu=lambda data: data != good)
    batch = pipeline.Batch()
    batch.add([5, 6], decoder.piece(["good", "photograph"]))
    batch.add([7, 8, 9, 10], pickle.loads(pickle.dumps(decoder.piece(["odd", "gone", "good", "nothing"]))))
    pixels = model.decode(batch).numpy()
    assert (pixels[0] == exact(good, 32)).all() and (pixels[4] == pixels[0]).all()
    assert np.abs(pixels[1] - exact(photograph, 32)).mean() < 1.5
    assert (pixels[2] == exact(odd, 32)).all() and not pixels[3].any() and not pixels[5:].any()
    assert batch.numbers == [5, 6, 7, 8, 9, 10] and sorted(batch.errors) == [3, 5]
    assert "no such image" in batch.errors[3] and "cannot be decoded" in batch.errors[5]


@pytest.mark.parametrize("workers", [0, 2])
def test_files_left_to_the_gpu_come_whole_from_the_processes(clip_folder, pictures, workers):
    names = [f"{number}.png" for number in range(12)]
    decoder = dataclasses.replace(encoder(clip_folder, pictures).decoder, on_gpu=lambda data: True)
    found = {}
    for batch in pipeline.batches(names, decoder, batch_size=5, workers=workers, pinned=False, meter=Meter()):
        found.update({names[batch.numbers[place]]: file.numpy().tobytes() for place, file in batch.encoded.items()})
    assert found == {name: (pictures / name).read_bytes() for name in names}


def test_the_log_says_what_bounds_the_stage(tmp_path, caplog):
    clock, meter = Clock(), Meter()
    clock.ready -= 10_000
    meter.add("decode", 9000.0)
    meter.add("model", 2000.0)
    meter.add("model", 2000.0)
    with caplog.at_level(logging.INFO, "surf"):
        clock.note(tmp_path / "part.parquet", 100, meter)
    assert "decode 90%, model 40%; decode bounds the stage" in caplog.text
    figures = json.loads((tmp_path / "_telemetry/part.json").read_text())
    assert figures["busy"] == {"decode": 0.9, "model": 0.4}
