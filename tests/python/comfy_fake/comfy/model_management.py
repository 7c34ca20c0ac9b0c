"""Which models are loaded, and how room is made for others."""

from __future__ import annotations

import gc
import weakref

import torch

MAX_PINNED_MEMORY = -1
TOTAL_PINNED_MEMORY = 0
current_loaded_models: list = []
#: By how much ComfyUI was asked to unlock, for tests.
asked_to_unpin: list = []
#: What tests say is free on the device.
free_bytes = 1 << 40


def module_size(module):
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def ensure_pin_registerable(size, evict_active=True):
    asked_to_unpin.append(TOTAL_PINNED_MEMORY + size - MAX_PINNED_MEMORY)
    return True


def get_torch_device():
    return torch.device("cpu")


def soft_empty_cache(force=False):
    return None


class LoadedModel:
    """One loaded model; holds its patcher weakly, and falls back to the parent's."""

    def __init__(self, model):
        self._set_model(model)
        self.device = model.load_device

    def _set_model(self, model):
        self._model = weakref.ref(model)
        if model.parent is not None:
            self._parent = weakref.ref(model.parent)
            weakref.finalize(model, self._switch_parent).atexit = False

    def _switch_parent(self):
        parent = self._parent()
        if parent is not None:
            self._set_model(parent)

    @property
    def model(self):
        return self._model()

    def model_unload(self, memory_to_free=None, unpatch_weights=True):
        if memory_to_free is not None and memory_to_free < self.model.loaded_size():
            offload = self.model.offload_device
            if self.model.partially_unload(offload, memory_to_free) >= memory_to_free:
                return False
        self.model.detach(unpatch_weights)
        return True


def loaded_models(only_currently_used=False):
    return [loaded.model for loaded in current_loaded_models]


def cleanup_models_gc():
    gc.collect()
    for loaded in list(current_loaded_models):
        if loaded.model is None:
            current_loaded_models.remove(loaded)


def unload_all_models():
    free_memory(1e30, None)


def free_memory(memory_required, device, keep_loaded=[]):  # noqa: B006
    for loaded in list(current_loaded_models):
        if loaded not in keep_loaded and loaded.model is not None:
            wanted = 1e32 if device is None else memory_required
            if loaded.model_unload(wanted):
                current_loaded_models.remove(loaded)


def load_models_gpu(models, memory_required=0, force_patch_weights=False):
    cleanup_models_gc()
    for model in models:
        for loaded in list(current_loaded_models):
            if model.is_clone(loaded.model):
                current_loaded_models.remove(loaded)
                loaded.model.detach(unpatch_all=False)
        budget = 0 if free_bytes >= 1 << 40 else max(0.1, free_bytes - memory_required)
        extra = 1e32 if budget == 0 else budget - model.loaded_size()
        model.partially_load(model.load_device, extra, force_patch_weights=force_patch_weights)
        current_loaded_models.insert(0, LoadedModel(model))
