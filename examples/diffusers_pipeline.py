"""Generate with any diffusers pipeline on these kernels, and show who served each attention layer.

python examples/diffusers_pipeline.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --prompt "a lighthouse in fog" --output lighthouse.png

Without --model a tiny pipeline with random weights runs, on a CPU in seconds.
"""

import argparse
import logging

import diffusers
import torch

from ldm4ts_kernels import accelerate_attention


def tiny_pipeline() -> diffusers.DiffusionPipeline:
    unet = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder of a diffusers pipeline")
    parser.add_argument("--prompt", help="for a pipeline that takes one")
    parser.add_argument("--precision", default="exact", choices=("exact", "int8"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", default="image.png")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if arguments.model:
        pipe = diffusers.DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=dtype)
    else:
        pipe = tiny_pipeline()
    pipe.to(device)
    prompt = {"prompt": arguments.prompt} if arguments.prompt else {}
    with accelerate_attention(pipe, precision=arguments.precision) as attention:
        image = pipe(**prompt, num_inference_steps=arguments.steps).images[0]
        attention.verify()
    image.save(arguments.output)
    logging.info("%s", attention.report())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
