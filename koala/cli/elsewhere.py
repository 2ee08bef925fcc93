"""Options of other programs (AUTOMATIC1111, diffusers, ComfyUI, kohya), and what to write here.

They are no options of ours, since there is one way to say a thing; whoever types one is told ours.
"""

from collections.abc import Sequence

COMMANDS = {  # as other programs call them, and tools in general -> what to write
    **dict.fromkeys(("txt2img", "img2img", "inpaint", "sample", "draw"), "koala generate"),
    **dict.fromkeys(("train", "fit"), "koala distill, or koala finetune on images of your own"),
    **dict.fromkeys(("webui", "api", "server"), "koala serve"),
    **dict.fromkeys(("info", "show"), "koala inspect"),
    **dict.fromkeys(("eval", "score"), "koala evaluate"),
    "prune": "koala compress MODEL --prune SHARE",
    "quantize": "koala convert MODEL --to diffusers --weights int4",
    "help": "koala --help, or koala COMMAND --help",
    "version": "koala --version",
}
OUT = {"--out": "--output --output-dir --outdir --out-dir --output-path --save-path -o"}
MODEL = "--ckpt --checkpoint --checkpoint-path --model-path --pretrained-model-name-or-path -m"
_HALF = "--half --fp16 --bf16 --precision --torch-dtype"
_DRAWING = OUT | {
    "the prompt without an option, as in koala generate 'a fox'": "--prompt -p",
    "--prompts": "--from-file --prompt-file --prompts-file --prompts-from-file",
    "--negative-prompt": "--neg --uc",
    "--model": MODEL,
    "--size WIDTHxHEIGHT": "--width --height --resolution --image-size -W -H",
    "--steps": "--num-inference-steps --inference-steps --num-steps --sampling-steps --ddim-steps",
    "--guidance": "--cfg --cfg-scale --guidance-scale --scale",
    "--scheduler": "--sampler --sampler-name --sampling-method --sampling",
    "--number": "--batch-size --batch-count --num-images --num-images-per-prompt --n-iter "
    "--n-samples",
    "--image": "--init-image --init-img --input-image --img2img -i",
    "--strength": "--denoising-strength --denoise --denoising --img2img-strength",
    "--mask": "--mask-image --inpaint-mask",
    "--lora FILE:SCALE": "--lora-scale --lora-weight --lora-weights",
    "--embedding": "--textual-inversion --embeddings",
    "--control": "--controlnet --control-net",
    "--vram GIB": "--lowvram --medvram --low-vram --cpu-offload --enable-model-cpu-offload",
    "--weights": f"{_HALF} --dtype --quantize",
    "--device": "--cpu --gpu --cuda",
}
_TRAINING = OUT | {
    "--data with a folder that koala prepare made": "--train-data-dir --dataset --dataset-name "
    "--data-dir --instance-data-dir",
    "--set training.samples=N, counted in images": "--max-train-steps --steps --num-train-steps "
    "--epochs --num-train-epochs --max-train-epochs",
    "--set training.batch=N": "--batch-size --train-batch-size --batch",
    "--set training.lr=X": "--lr --learning-rate --unet-lr",
    "--set training.seed=N": "--seed",
    "--set hardware.accumulate=N": "--gradient-accumulation-steps --accumulate",
    "the same command again: it resumes": "--resume --resume-from-checkpoint --resume-from",
    "koala prepare --size": "--resolution --size",
    "--log": "--report-to --log-with --logger",
    "--gpus with --dry-run; else start it by torchrun": "--num-gpus --num-processes",
}
_OF = {
    "generate": _DRAWING,
    "serve": {
        "--host 0.0.0.0": "--listen --server-name",
        "--allow-origin": "--cors-allow-origins --cors",
        "--api-key-file": "--api-key --api-auth --auth",
        "--model": MODEL,
        "nothing: the API is always there": "--api --nowebui",
        "--vram GIB": "--lowvram --medvram --low-vram",
    },
    "distill": _TRAINING | {"--teacher": f"--model {MODEL}"},
    "finetune": _TRAINING
    | {
        "--model": f"--teacher {MODEL}",
        "--set lora.rank=N": "--rank --network-dim --lora-rank",
        "--set lora.alpha=N": "--alpha --network-alpha --lora-alpha",
    },
    "prepare": OUT
    | {
        "--model": f"--vae-model {MODEL}",
        "--size": "--resolution --image-size",
        "--workers": "--num-workers --max-data-loader-n-workers --dataloader-num-workers",
        "--caption": "--caption-column --caption-field",
    },
    "compress": OUT
    | {
        "--to": "--student --arch --architecture --target",
        "--prune SHARE": "--ratio --sparsity --pruning-ratio --amount",
        "--dtype": _HALF,
    },
    "convert": OUT | {"--to": "--format --target", "--dtype": _HALF},
    "export": OUT | {"--to": "--format --target --backend", "--dtype": f"{_HALF} --quantize"},
    "evaluate": OUT | {"--guidance": "--cfg --cfg-scale --guidance-scale", "--seeds": "--seed"},
}


def told(command: str, arguments: Sequence[str]) -> str | None:
    """The first option of another program among a command's arguments, and what to write."""
    own = {option: ours for ours, names in _OF.get(command, {}).items() for option in names.split()}
    for argument in arguments:
        if argument == "--":
            return None
        given = argument.partition("=")[0]
        name = given if len(given) == 2 else given.lower().replace("_", "-")
        if name in own:
            return f"koala {command} does not take {given!r}: write {own[name]}"
    return None
