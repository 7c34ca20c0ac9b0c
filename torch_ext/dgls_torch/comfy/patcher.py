"""The model patcher: ComfyUI places all but the blocks, the engine places the blocks."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import LowVramPatch, ModelPatcher, get_key_weight

from dgls_torch.comfy.containers import unsupported
from dgls_torch.comfy.lora import Factors, factors
from dgls_torch.comfy.pins import pinned_limit
from dgls_torch.comfy.residency import Residency, sizes_of, streamed_blocks
from dgls_torch.comfy.settings import LoraMode, Settings
from dgls_torch.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from dgls_torch.comfy.sizes import Sizes

log = logging.getLogger("dgls_torch")
KEY = "dgls"
_ALL = 1e32  # ComfyUI's own number for a budget without an end


class StreamPatcher(ModelPatcher):  # type: ignore[misc]
    """A patcher whose blocks stay in host memory, bound to the device while they run.

    ComfyUI's loader is told nothing of the blocks: it neither moves, pins nor counts them. They
    keep their masters outside of their forward, with ComfyUI's cast at use switched on, so a block
    that the engine does not serve computes the same, slower. What the engine holds is counted in
    ``loaded_size`` and given back when ComfyUI asks.

    Made by `dgls_torch.comfy.attach.stream_model` out of a clone; clones of it are of this class.
    """

    _factors: Factors | None = None  # of the class: patchers are made into this one when they are

    def _settings(self) -> Settings | None:
        # ModelPatcher.__init__ calls methods of this class before there are attachments.
        found = getattr(self, "attachments", {}).get(KEY)
        return found if isinstance(found, Settings) else None

    def _residency(self) -> Residency:
        return Residency.of(self.model)

    def _sizes(self, settings: Settings) -> Sizes:
        cached = getattr(self, "_dgls_sizes", None)
        if cached is None or cached[0] is not settings:
            cached = self._dgls_sizes = (settings, sizes_of(self.model, settings))
        return cached[1]

    # ---- what is wanted

    def why_not(self, device: torch.device | None = None) -> str | None:
        """Why this patcher cannot stream as things stand; ``None`` when it can."""
        device = self.load_device if device is None else device
        options = self.model_options
        wrappers = options.get("transformer_options", {}).get("wrappers", {})
        compiled = "torch_compile_kwargs" in options or any(
            "torch.compile" in by_key for by_key in [*wrappers.values(), *self.wrappers.values()]
        )
        if device.type not in ("cpu", "cuda") or torch.version.hip is not None:
            return f"it runs on {device}, and only NVIDIA's CUDA and the CPU are served"
        if self.offload_device.type != "cpu":
            return "ComfyUI was told to keep models on the GPU (--gpu-only or --highvram)"
        if self.hook_patches or self.forced_hooks is not None:
            return "its conditioning carries weight hooks, which change weights while sampling"
        if any(_replaces_block(*patch) for patch in self.object_patches.items()):
            return "another node puts a module of its own in place of a part of the network"
        if compiled:
            return "it is compiled by torch.compile, which cannot follow weights that move"
        return unsupported(self.model.diffusion_model)

    def _budget(self, device: torch.device, offered: float) -> int | None:
        """The budget for all weights; ``None`` to leave the model to ComfyUI, and why.

        Raises:
            ValueError: The budget that was asked for is too small for the model.
        """
        settings, residency = self._settings(), self._residency()
        if settings is None:
            residency.passed_by = "it is a plain model"
            return None
        residency.passed_by = self.why_not(device)
        if residency.passed_by is not None:
            return None
        sizes = self._sizes(settings)
        if settings.vram_bytes is None and settings.resident is None:
            room = _ALL if device.type == "cpu" else max(0.0, offered - settings.reserve_bytes)
            if room > sizes.total_bytes:
                residency.passed_by = "all of it fits the device: nothing to stream"
                return None
            if room < sizes.least_bytes:
                residency.passed_by = (
                    f"ComfyUI offers {format_bytes(room)} and its smallest budget is "
                    f"{format_bytes(sizes.least_bytes)}"
                )
                return None
            return int(room)
        asked = self._asked_bytes(settings, sizes)
        if residency.stream is not None:  # what was given back is not taken again by force
            asked = min(asked, max(residency.stream.plan.vram_bytes, int(min(offered, 1 << 62))))
        if asked >= sizes.total_bytes and settings.resident is None:
            residency.passed_by = f"all of it fits {format_bytes(asked)}: nothing to stream"
            return None
        sizes.check(asked)
        return asked

    @staticmethod
    def _asked_bytes(settings: Settings, sizes: Sizes) -> int:
        if settings.vram_bytes is not None:
            return settings.vram_bytes
        streamed = sum(size for _, size in sizes.blocks)
        return sizes.outside_bytes + min(streamed, settings.slots * sizes.largest[1])

    # ---- what ComfyUI's accounting reads

    def model_size(self) -> int:
        """What the model wants on the device: not the sum of its weights, where it streams."""
        settings = self._settings()
        if settings is None:
            return super().model_size()  # type: ignore[no-any-return]
        if self._residency().stream is not None:
            return self.loaded_size()
        total = int(mm.module_size(self.model))
        if (settings.vram_bytes is None and settings.resident is None) or self.why_not():
            return total
        return min(total, self._asked_bytes(settings, self._sizes(settings)))

    def loaded_size(self) -> int:
        """What is on the device; ``load`` counts the arena in."""
        return self.model.model_loaded_weight_memory  # type: ignore[no-any-return]

    def is_clone(self, other: Any) -> bool:
        """As ComfyUI's; it asks the patcher to be loaded just before it detaches the loaded one."""
        result = bool(super().is_clone(other))
        residency = self._residency()
        if result and self._settings() is not None and residency.owner == id(other):
            residency.expected = True
        return result

    # ---- loading

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        entries = super()._load_list(*args, **kwargs)
        skipped = getattr(self, "_dgls_skipped", None) or self._held_modules()
        return [entry for entry in entries if entry[-2] not in skipped]

    def _held_modules(self) -> set[nn.Module]:
        settings = self._settings()
        if settings is None or self._residency().stream is None:
            return set()
        blocks = streamed_blocks(self.model.diffusion_model, settings)
        return {module for _, block in blocks for module in block.modules()}

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """As ComfyUI's; a model that was loaded the other way is unloaded first."""
        self._residency().expected = False
        offered = self.model.model_loaded_weight_memory + extra_memory
        budget = self._budget(device_to, offered)
        is_loaded = self.model.current_weight_patches_uuid is not None
        if is_loaded and (budget is not None) != self._residency().streams:
            self._release()
            extra_memory += self.model.model_loaded_weight_memory
            self.unpatch_model(self.offload_device, unpatch_weights=True)
        return super().partially_load(  # type: ignore[no-any-return]
            device_to, extra_memory, force_patch_weights=force_patch_weights
        )

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        """Loads all but the blocks as ComfyUI does, and gives the blocks to the engine."""
        device = self.load_device if device_to is None else device_to
        offered = _ALL if full_load or lowvram_model_memory == 0 else lowvram_model_memory
        budget = self._budget(device, offered)
        self._residency().streams = budget is not None
        if budget is None:
            self._release()
            self._tell(f"not streaming {self._name()}: {self._residency().passed_by}")
            super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
            return
        settings = self._settings()
        assert settings is not None
        blocks = streamed_blocks(self.model.diffusion_model, settings)
        with self._skipping({module for _, block in blocks for module in block.modules()}):
            super().load(device_to, _ALL, force_patch_weights, False)
        baked = force_patch_weights or settings.lora is LoraMode.BAKED
        room = budget - self._sizes(settings).least_bytes
        self._patch_blocks([block for _, block in blocks], device, baked, room)
        self.model.model_lowvram = True  # so that ComfyUI takes off what _patch_blocks put on
        held = self._factors.device_bytes if self._factors is not None else 0
        self.model.model_loaded_weight_memory += held
        spared = settings.reserve_bytes if settings.vram_bytes is None else 0
        budget -= max(0, held - spared)
        self._attach(tuple(name for name, _ in blocks), settings, budget, device, offered)

    def _attach(
        self,
        names: tuple[str, ...],
        settings: Settings,
        budget: int,
        device: torch.device,
        offered: float,
    ) -> None:
        residency = self._residency()
        residency.owner = id(self)
        net = self.model.diffusion_model
        sizes = self._sizes(settings)
        pinned = pinned_limit(sum(size for _, size in sizes.blocks))
        smaller = max(int(min(budget / 2, offered)), sizes.least_bytes)
        # The same again: the first time what torch holds in fragments may be in the way.
        for vram in (budget, budget, smaller):
            if residency.attached(net, names, vram, device, pinned, settings.compress):
                break
            mm.soft_empty_cache()
        stream = residency.stream
        if stream is None:
            residency.passed_by = f"not even {format_bytes(vram)} are free on {device}"
            log.warning("DGLS: %s runs from host memory: %s", self._name(), residency.passed_by)
            return
        self.model.model_loaded_weight_memory += residency.held_bytes
        self._tell(f"streaming {self._name()}: {stream.plan}")

    @contextlib.contextmanager
    def _skipping(self, modules: set[nn.Module]) -> Iterator[None]:
        self._dgls_skipped = modules
        try:
            yield
        finally:
            self._dgls_skipped = set()

    def _patch_blocks(
        self, blocks: list[nn.Module], device: torch.device, baked: bool, room: int
    ) -> None:
        """Switches on cast at use, and puts LoRAs in place, for the modules of the blocks."""
        inside = {module for block in blocks for module in block.modules()}
        modules = [(n, m) for n, m in self.model.named_modules() if m in inside]
        if baked:
            self._factors = None
        elif self._factors is None or self._factors.version != self.patches_uuid:
            used = (f"{name}.{param}" for name, _ in modules for param in ("weight", "bias"))
            self._factors = factors(self.patches, used, device, room, self.patches_uuid)
        count = 0
        for name, module in modules:
            keys = [f"{name}.{param}" for param in module._parameters]
            castable = hasattr(module, "comfy_cast_weights")
            for key in keys:
                # What is no operation of ComfyUI's has no function at use: it can only be baked.
                is_weight = castable and key.rsplit(".", 1)[1] in ("weight", "bias")
                if key in self.patches and (baked or not is_weight) and not _is_walked(module):
                    self._bake(key, device)
            if castable:
                count += self._cast_at_use(module, name, baked)
        self.model.lowvram_patch_counter += count

    def _cast_at_use(self, module: Any, name: str, baked: bool) -> int:
        if not hasattr(module, "prev_comfy_cast_weights"):
            module.prev_comfy_cast_weights = module.comfy_cast_weights
        module.comfy_cast_weights = True
        module.comfy_force_cast_weights = self.force_cast_weights
        module.comfy_patched_weights = baked
        count = 0
        for param in ("weight", "bias"):
            key = f"{name}.{param}"
            functions: list[Any] = []
            if self._factors is not None and key in self._factors.patches:
                _, set_func, convert_func = get_key_weight(self.model, key)
                patches = self._factors.patches
                functions.append(LowVramPatch(key, patches, convert_func, set_func))
                count += 1
            functions += self.weight_wrapper_patches.get(key, [])
            setattr(module, f"{param}_function", functions)
        return count

    def _bake(self, key: str, device: torch.device) -> None:
        if key in self.backup:
            return  # baked already, by the loading before
        self.patch_weight_to_device(key, device_to=device)
        weight, _, _ = get_key_weight(self.model, key)
        if weight.device.type != "cpu":
            module = self.model.get_submodule(key.rsplit(".", 1)[0])
            name = key.rsplit(".", 1)[1]
            moved = weight.detach().to("cpu")
            module._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)

    # ---- unloading

    def deepclone_multigpu(
        self, new_load_device: Any = None, models_cache: dict[Any, Any] | None = None
    ) -> Any:
        """As ComfyUI's: a model of its own for another device. It must not be a dynamic one.

        ComfyUI loads the file by what the loader left it, which on NVIDIA gives weights that only
        its dynamic patcher can serve.
        """
        init: Any = getattr(self, "cached_patcher_init", None)
        if init is not None:
            load = functools.partial(init[0], disable_dynamic=True)
            self.cached_patcher_init = (load, *init[1:])
        try:
            made = super().deepclone_multigpu(new_load_device, models_cache)
        finally:
            self.cached_patcher_init = init
        made.cached_patcher_init = init
        return made

    def _release(self) -> int:
        held = self._residency().release()
        loaded = self.model.model_loaded_weight_memory
        self.model.model_loaded_weight_memory = max(0, loaded - held)
        return held

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Gives back so much of the arena, or all of it; what is not in blocks stays."""
        residency = self._residency()
        if residency.stream is None:
            return super().partially_unload(  # type: ignore[no-any-return]
                device_to, memory_to_free, force_patch_weights=force_patch_weights
            )
        try:
            freed = residency.shrink(int(min(memory_to_free, 1 << 62)))
        except RuntimeError as error:
            log.warning("DGLS: nothing given back: %s", error)
            return 0
        self.model.model_loaded_weight_memory -= freed
        self._tell(f"{self._name()} gave {format_bytes(freed)} back")
        return freed

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        """As ComfyUI's. It also detaches a loaded model just before it loads it again."""
        residency = self._residency()
        if unpatch_all or residency.owner == id(self):
            if unpatch_all or not residency.expected:
                self._release()
                residency.owner = None
                self._factors = None
            residency.expected = False
        return super().detach(unpatch_all)  # type: ignore[no-any-return]

    # ---- sampling

    def pre_run(self) -> None:
        """As ComfyUI's, before a sampling run: the blocks are hooked."""
        self._residency().resume()
        super().pre_run()

    def cleanup(self) -> None:
        """As ComfyUI's, after a sampling run, also an interrupted one: the hooks are off."""
        residency = self._residency()
        try:
            residency.suspend()
        except RuntimeError as error:
            log.warning("DGLS: %s", error)
            self._release()
        finally:
            super().cleanup()
        settings = self._settings()
        if settings is not None and settings.verbose and residency.stream is not None:
            self._tell(str(residency.stream.report()))

    def _name(self) -> str:
        return type(self.model).__name__

    def _tell(self, text: str) -> None:
        settings = self._settings()
        first, _, rest = text.partition("\n")
        log.info("DGLS: %s", first)
        if rest and settings is not None and settings.verbose:
            for line in rest.splitlines():
                log.info("DGLS: %s", line)


def _replaces_block(name: str, value: object) -> bool:
    return name.startswith("diffusion_model") and isinstance(value, torch.nn.Module)


def _is_walked(module: nn.Module) -> bool:
    """Whether ComfyUI's loader leaves a module's own parameters alone, for those below it."""
    own = set(module._parameters)
    return any(name not in own for name, _ in module.named_parameters())
