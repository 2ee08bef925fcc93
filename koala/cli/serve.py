"""`koala serve`."""

import argparse
from pathlib import Path

from koala.checkpoints.bundled import SERVED
from koala.cli.command import Command, Parser, number, say, whole
from koala.serving.settings import (
    CONTENT_SCORE,
    Limits,
    Options,
    Scale,
    check,
    data_folder,
    gallery_bytes,
    hosts,
    limits_of,
    origins,
    quality_steps,
    root_path,
    words,
)
from koala.utils.threads import limit_threads, sleep_while_waiting

LIMITS = (  # name, what it limits, type
    ("queue", "images that wait or are being drawn", whole),
    ("client-queue", "of these, images of one client", whole),
    ("rate", "requests per minute of one client; 0 for any number", number),
    ("burst", "requests of one client at once", whole),
    ("drain", "seconds that images being drawn may still take at SIGTERM", number),
)


def _arguments(p: Parser) -> None:
    usual = Limits()
    p.add_argument(
        "--model", default=SERVED,
        help=f"bundled name, folder, single file or Hub id (default {SERVED})",
    )  # fmt: skip
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    p.add_argument("--port", type=whole, default=8000, help="default 8000; 0 takes any free port")
    p.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="one key per line; every request needs one",
    )
    p.add_argument(
        "--data", type=Path, metavar="DIR",
        help="where images and jobs are kept (default: $KOALA_DATA, or ~/.local/share/koala)",
    )  # fmt: skip
    p.add_argument("--lora-dir", type=Path, metavar="DIR", help="LoRAs that requests may name")
    p.add_argument(
        "--embedding-dir", type=Path, metavar="DIR",
        help="textual inversions that prompts may name by their files' names",
    )  # fmt: skip
    p.add_argument(
        "--replicas", metavar="N or N-M",
        help="run N engines over Ray Serve, up to M while requests queue; each has a GPU or a core",
    )  # fmt: skip
    p.add_argument(
        "--model-alias", metavar="NAMES",
        help="further names of the model in OpenAI's API, such as gpt-image-1,dall-e-3",
    )  # fmt: skip
    p.add_argument(
        "--quality-steps", metavar="TABLE",
        help="steps of OpenAI's qualities, such as low=4,high=25 (default: no effect)",
    )  # fmt: skip
    p.add_argument(
        "--fit", action=argparse.BooleanOptionalAction, default=True,
        help="draw sizes that the model was not made for at its own size, and resize (default on)",
    )  # fmt: skip
    p.add_argument(
        "--content-filter", nargs="?", type=number, const=CONTENT_SCORE, metavar="SCORE",
        help="hold back images that a classifier takes for pornographic: from this score on, above "
        f"0, up to 1 (default off; without a score {CONTENT_SCORE:g})",
    )  # fmt: skip
    p.add_argument(
        "--sign-key", type=Path, metavar="FILE",
        help="a private key (PEM): each image carries a C2PA manifest that is signed with it",
    )  # fmt: skip
    p.add_argument(
        "--sign-certificates", type=Path, metavar="FILE",
        help="its certificate (PEM), followed by those that it was signed with",
    )  # fmt: skip
    network = p.add_argument_group("names and pages, each a list with commas")
    network.add_argument(
        "--allow-host", metavar="NAMES",
        help="further names that this server is called by, such as host.docker.internal; * for any",
    )  # fmt: skip
    network.add_argument(
        "--allow-origin", metavar="ORIGINS",
        help="pages elsewhere that may call this server, such as https://example.org",
    )  # fmt: skip
    network.add_argument(
        "--trusted-proxy", metavar="ADDRESSES",
        help="proxies whose X-Forwarded-For, -Proto and -Host are believed (default: none)",
    )  # fmt: skip
    p.add_argument(
        "--root-path", metavar="PATH", help="where a proxy shows this server, such as /koala"
    )
    runtime = p.add_argument_group("speed and memory, as in koala generate")
    runtime.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: the best available)")
    runtime.add_argument("--backend", help="torch, openvino, auto and so on")
    runtime.add_argument("--compile", action="store_true", help="use torch.compile, cached on disk")
    runtime.add_argument("--graphs", action="store_true", help="replay steps from CUDA graphs")
    runtime.add_argument(
        "--vram", metavar="GIB", help="stay within this many GiB, or within 'free'"
    )
    limits = p.add_argument_group("limits")
    limits.add_argument(
        "--max-batch", type=whole, metavar="N", help="images in one pass (default: measured)"
    )
    limits.add_argument(
        "--max-size", metavar="WIDTHxHEIGHT",
        help="the most pixels of an image (default: four times the model's own size)",
    )  # fmt: skip
    for name, says, kind in LIMITS:
        default = getattr(usual, name.replace("-", "_"))
        limits.add_argument(
            f"--{name}", type=kind, default=default, metavar="N",
            help=f"{says} (default {default:g})",
        )  # fmt: skip
    gallery = p.add_argument_group("gallery")
    gallery.add_argument(
        "--gallery-gib", type=number, default=4.0, metavar="GIB",
        help="GiB to keep at most (default 4)",
    )  # fmt: skip
    gallery.add_argument(
        "--gallery-days", type=number, default=30.0, metavar="DAYS",
        help="days to keep images at most (default 30)",
    )  # fmt: skip


def _run(o: argparse.Namespace) -> None:
    limits = limits_of(
        o.max_size, max_batch=o.max_batch, queue=o.queue, client_queue=o.client_queue,
        rate=o.rate, burst=o.burst, drain=o.drain,
    )  # fmt: skip
    options = Options(
        model=o.model, host=o.host, port=o.port, api_key_file=o.api_key_file, device=o.device,
        backend=o.backend, vram=o.vram, compile=o.compile, graphs=o.graphs, lora_dir=o.lora_dir,
        embedding_dir=o.embedding_dir,
        data=o.data or data_folder(), gallery_bytes=gallery_bytes(o.gallery_gib),
        gallery_days=o.gallery_days, limits=limits, fit=o.fit, model_aliases=words(o.model_alias),
        quality_steps=quality_steps(o.quality_steps), allow_hosts=hosts(o.allow_host),
        allow_origins=origins(o.allow_origin), trusted_proxies=words(o.trusted_proxy),
        root_path=root_path(o.root_path),
        content_filter=o.content_filter, sign_key=o.sign_key, sign_certificates=o.sign_certificates,
    )  # fmt: skip
    sleep_while_waiting()
    if o.replicas is None:
        limit_threads()  # Ray gives each replica its own
        from koala.serving.run import serve

        serve(options, say)
    else:
        scale = Scale.parse(o.replicas)
        check(options)
        from koala.serving.ray import scaleout  # all is checked: now torch and Ray may load

        scaleout.serve(options, scale, say)


SERVE = Command(
    "serve",
    "serve OpenAI's images API, jobs and a web page over HTTP",
    (
        "koala serve --port 8000",
        "koala serve --model path/to/model --host 0.0.0.0 --api-key-file keys.txt",
        "koala serve --replicas 1-4",
    ),
    _arguments,
    _run,
)
