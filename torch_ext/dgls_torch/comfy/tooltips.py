"""The tooltips of the nodes' inputs: what each does, or why it no longer needs to."""

from __future__ import annotations

NO_EFFECT = "Accepted for saved workflows; it has no effect: "

VRAM = (
    'Device memory for all of the model\'s weights: "auto", or a size such as "8GiB". Auto takes '
    "what ComfyUI offers after the room for sampling; a model that fits is then left alone."
)
VRAM_WITH_INDICES = f"{VRAM} With gpu_layer_indices, auto is what those layers and prefetch need."

LOADER = {
    "model_name": "A file in models/diffusion_models or models/unet.",
    "model_type": (
        "How the file is read. default is right for every model; hunyuan reads the weights first "
        "and detects the model from them; unet ignores cast_dtype. The last two are for debugging."
    ),
    "cast_dtype": (
        "The format that the weights are loaded in. default and disabled leave it to ComfyUI; "
        "fp8_e4m3fn_fast also computes in fp8 where the GPU can."
    ),
    "full_cast": (
        "Casts the weights once more after loading; normalisations keep their format. fp8, fp4 "
        "and nf4 apply to the blocks only. fp4 (NVFP4) and nf4 are stored in 4 bits; nf4 needs "
        "bitsandbytes, and becomes bf16 with a message without it. Pictures change."
    ),
    "clear_model_cache": "Unloads every other model first. ComfyUI makes room by itself otherwise.",
    "verbose": "Writes what was loaded to the log.",
    "nuke_all_caches": (
        "As clear_model_cache, and has ComfyUI drop the cached outputs of all nodes when this "
        "prompt has ended. Everything is loaded again after that."
    ),
}

SWAPPER = {
    "model": "The model to stream; it is cloned, not changed.",
    "layers": "The blocks, from DGLS Model Loader. They must be of this model.",
    "prefetch": (
        "With gpu_layer_indices: how many streamed layers are held ahead of the running one. "
        "Without it the planner chooses within vram, and this has no effect."
    ),
    "cpu_threading": f"{NO_EFFECT}a thread copies where, and only where, it helps.",
    "cuda_streams": f"{NO_EFFECT}copies always run on a stream of their own, in order by events.",
    "cuda_graphs": f"{NO_EFFECT}blocks are hooked one by one, which a graph cannot follow.",
    "lora_size_mb": "Megabytes that an automatic vram leaves free for LoRA weights.",
    "verbose": "Writes the plan, and after each run what was measured, to the log.",
    "gpu_layer_indices": (
        'Layers that stay on the GPU, as in "0,1,5": counted from 0, in the order of layers. All '
        "others are streamed. Empty: the planner chooses."
    ),
    "cast_target": (
        'Casts weights of the streamed layers once: "FROM TO" pairs such as "bf16 f16, f32 bf16". '
        "Formats: f32, f16, bf16, f8_e4m3, f8_e5m2, fp4, nf4 (needs bitsandbytes, else bf16). "
        "Normalisations are kept. The file is loaded a second time, as others may use this copy."
    ),
    "vram": VRAM_WITH_INDICES,
    "lora": (
        "Where LoRA maths is done for streamed weights. on the fly: at each use, changes of "
        "strength are free. baked: once, into the weights, faster steps and the same numbers as "
        "a model that is loaded completely; it takes host memory for the originals."
    ),
}

STREAM = {
    "model": "Any MODEL: from a loader, a checkpoint, after LoRAs.",
    "vram": VRAM,
    "unit": (
        "What is copied at a time. layer: each layer of a block by itself; more of the model stays "
        "on the GPU, less memory is enough, and each layer costs the CPU what a block does."
    ),
    "compress": (
        "auto: bf16 and fp8 weights are copied in a smaller form and restored on the GPU, bit by "
        "bit: as many as hide the copies behind the GPU's work. It also holds up to two thirds of "
        "what is streamed in host memory (fp8: nine tenths), and 32 to 128 MiB of vram."
    ),
}

CLEANUP = {
    "trigger": "Anything; it is passed through. The cleanup runs when it is there.",
    "use_comfy_clear": "Unloads every model of ComfyUI. Off: only what DGLS holds is given back.",
    "verbose": "Writes to the log how much device memory is still in use.",
}

REPORT = {
    "model": "The MODEL that was sampled: what DGLS Stream or DGLS Swapping Loader gave.",
    "after": "Connect the sampler's output here, so that the report comes after it.",
}
