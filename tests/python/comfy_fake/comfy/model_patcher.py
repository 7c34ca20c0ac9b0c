"""The legacy model patcher: patches, clones, loading in whole or in part."""

from __future__ import annotations

import collections
import contextlib
import uuid

import comfy.model_management as mm
import torch


def get_key_weight(model, key):
    """A weight by its dotted name, and its module's own ways of writing and reading it."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    found = getattr(module, name)
    return found, getattr(module, f"set_{name}", None), getattr(module, f"convert_{name}", None)


def calculate_weight(patches, weight):
    """Patches here are differences: strength times a tensor, added."""
    for strength, difference, strength_model, _, _ in patches:
        weight = weight * strength_model + strength * difference.to(weight)
    return weight


class LowVramPatch:
    """Applies a key's patches at use."""

    def __init__(self, key, patches, convert_func=None, set_func=None):
        self.key, self.patches = key, patches

    def __call__(self, weight):
        return calculate_weight(self.patches[self.key], weight)


def wipe_lowvram_weight(m):
    if hasattr(m, "prev_comfy_cast_weights"):
        m.comfy_cast_weights = m.prev_comfy_cast_weights
        del m.prev_comfy_cast_weights
    if hasattr(m, "weight_function"):
        m.weight_function, m.bias_function = [], []


class ModelPatcher:
    """One way of using a model; clones share the model."""

    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        self.model, self.size = model, size
        self.load_device, self.offload_device = load_device, offload_device
        self.patches: dict = {}
        self.backup: dict = {}
        self.object_patches: dict = {}
        self.object_patches_backup: dict = {}
        self.weight_wrapper_patches: dict = {}
        self.model_options: dict = {"transformer_options": {}}
        self.force_cast_weights = False
        self.patches_uuid = uuid.uuid4()
        self.parent = None
        self.attachments: dict = {}
        self.wrappers: dict = {}
        self.hook_patches: dict = {}
        self.forced_hooks = None
        self.cached_patcher_init = None
        for name, value in (
            *(("device", offload_device), ("model_loaded_weight_memory", 0)),
            *(("lowvram_patch_counter", 0), ("model_lowvram", False)),
            *(("current_weight_patches_uuid", None), ("current_patcher", None)),
        ):
            if not hasattr(model, name):
                setattr(model, name, value)

    def is_dynamic(self):
        return False

    def model_size(self):
        if self.size == 0:
            self.size = mm.module_size(self.model)
        return self.size

    def loaded_size(self):
        return self.model.model_loaded_weight_memory

    def current_loaded_device(self):
        return self.model.device

    def clone(self, disable_dynamic=False, model_override=None, force_deepcopy=False):
        model, backups = self.model, (self.backup, self.object_patches_backup)
        kind = self.__class__
        leaves = self.is_dynamic() and disable_dynamic
        if leaves or force_deepcopy:
            kind = ModelPatcher if leaves else kind
            function, arguments = self.cached_patcher_init
            made = function(*arguments, disable_dynamic=True)
            model, backups = made.model, (made.backup, made.object_patches_backup)
        if model_override is not None:
            model, backups = model_override
        n = kind(model, self.load_device, self.offload_device, self.model_size())
        n.patches = {key: list(value) for key, value in self.patches.items()}
        n.patches_uuid = self.patches_uuid
        n.object_patches = dict(self.object_patches)
        n.weight_wrapper_patches = dict(self.weight_wrapper_patches)
        n.parent = self
        n.force_cast_weights = self.force_cast_weights
        n.backup, n.object_patches_backup = backups
        for key, value in self.attachments.items():
            cloned = getattr(value, "on_model_patcher_clone", None)
            n.attachments[key] = value if cloned is None else cloned()
        for kind, by_key in self.wrappers.items():
            n.wrappers[kind] = {key: list(value) for key, value in by_key.items()}
        n.hook_patches = dict(self.hook_patches)
        n.cached_patcher_init = self.cached_patcher_init
        return n

    def deepclone_multigpu(self, new_load_device=None, models_cache=None):
        function, arguments = self.cached_patcher_init
        n = self.clone(model_override=(function(*arguments).model, ({}, {})))
        n.load_device = new_load_device or n.load_device
        return n

    def is_clone(self, other):
        return self.model is getattr(other, "model", None)

    def add_object_patch(self, name, obj):
        self.object_patches[name] = obj

    def add_wrapper_with_key(self, wrapper_type, key, wrapper):
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type, key):
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def set_attachments(self, key, attachment):
        self.attachments[key] = attachment

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        known = self.model.state_dict()
        for key in [key for key in patches if key in known]:
            patch = (strength_patch, patches[key], strength_model, None, None)
            self.patches.setdefault(key, []).append(patch)
        self.patches_uuid = uuid.uuid4()

    def use_ejected(self, skip_and_inject_on_exit_only=False):
        return contextlib.nullcontext()

    def patch_weight_to_device(
        self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False
    ):
        weight, _, _ = get_key_weight(self.model, key)
        if key not in self.patches:
            return weight
        if key not in self.backup:
            kept = collections.namedtuple("Kept", ["weight", "inplace_update"])
            self.backup[key] = kept(weight.to(self.offload_device), False)
        made = calculate_weight(self.patches[key], weight.to(device_to, torch.float32, copy=True))
        _set_param(self.model, key, made.to(weight.dtype))
        return None

    def _load_list(self, for_dynamic=False, default_device=None):
        entries = []
        for n, m in self.model.named_modules():
            params = dict(m.named_parameters(recurse=False))
            below = [name for name, _ in m.named_parameters() if name not in params]
            if not below and (hasattr(m, "comfy_cast_weights") or params):
                size = mm.module_size(m)
                entries.append((size, size, n, m, params))
        return entries

    def load(
        self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False
    ):
        used, offloaded = 0, 0
        for _, size, n, m, params in sorted(self._load_list(), key=lambda e: -e[0]):
            castable = hasattr(m, "comfy_cast_weights")
            fits = full_load or used + size < lowvram_model_memory
            if castable and not fits:
                offloaded += 1
                if not hasattr(m, "prev_comfy_cast_weights"):
                    m.prev_comfy_cast_weights = m.comfy_cast_weights
                m.comfy_cast_weights = True
                for name in ("weight", "bias"):
                    key = f"{n}.{name}"
                    functions = [LowVramPatch(key, self.patches)] if key in self.patches else []
                    setattr(m, f"{name}_function", functions)
                continue
            if castable:
                wipe_lowvram_weight(m)
            used += size
            if not getattr(m, "comfy_patched_weights", False):
                for name in params:
                    self.patch_weight_to_device(f"{n}.{name}", device_to)
                m.to(device_to)
                m.comfy_patched_weights = True
        self.model.model_lowvram = offloaded > 0
        if full_load:
            self.model.to(device_to)
            used = self.model_size()
        self.model.device = device_to
        self.model.model_loaded_weight_memory = used
        self.model.current_weight_patches_uuid = self.patches_uuid

    def patch_model(
        self, device_to=None, lowvram_model_memory=0, load_weights=True, force_patch_weights=False
    ):
        for name, value in self.object_patches.items():
            path, _, last = name.rpartition(".")
            owner = self.model.get_submodule(path)
            self.object_patches_backup.setdefault(name, getattr(owner, last))
            setattr(owner, last, value)
        if load_weights:
            whole = lowvram_model_memory == 0
            self.load(device_to, lowvram_model_memory, force_patch_weights, whole)
        return self.model

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for m in self.model.modules() if self.model.model_lowvram else ():
                wipe_lowvram_weight(m)
            self.model.model_lowvram = False
            self.model.lowvram_patch_counter = 0
            for key, kept in self.backup.items():
                _set_param(self.model, key, kept.weight)
            self.backup.clear()
            self.model.current_weight_patches_uuid = None
            self.model.to(device_to)
            self.model.model_loaded_weight_memory = 0
            for m in self.model.modules():
                if hasattr(m, "comfy_patched_weights"):
                    del m.comfy_patched_weights
        for name, value in self.object_patches_backup.items():
            path, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(path), last, value)
        self.object_patches_backup.clear()

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        freed = 0
        for _, size, n, m, params in sorted(self._load_list(), key=lambda e: e[0]):
            if freed > memory_to_free:
                break
            if not getattr(m, "comfy_patched_weights", False):
                continue
            for name in params:
                kept = self.backup.pop(f"{n}.{name}", None)
                if kept is not None:
                    _set_param(self.model, f"{n}.{name}", kept.weight)
            m.to(device_to)
            for name in ("weight", "bias"):
                key = f"{n}.{name}"
                functions = [LowVramPatch(key, self.patches)] if key in self.patches else []
                setattr(m, f"{name}_function", functions)
            m.prev_comfy_cast_weights, m.comfy_cast_weights = m.comfy_cast_weights, True
            m.comfy_patched_weights = False
            freed += size
        self.model.model_lowvram = True
        self.model.model_loaded_weight_memory -= freed
        return freed

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        current = self.model.current_weight_patches_uuid
        stale = current is not None and (current != self.patches_uuid or force_patch_weights)
        used = self.model.model_loaded_weight_memory
        self.unpatch_model(self.offload_device, unpatch_weights=stale)
        extra_memory += used - self.model.model_loaded_weight_memory
        self.patch_model(load_weights=False)
        if extra_memory < 0 and not stale:
            self.partially_unload(self.offload_device, -extra_memory)
            return 0
        loaded = self.model.model_loaded_weight_memory
        if not self.model.model_lowvram and loaded > 0:
            return 0
        whole = loaded + extra_memory > self.model_size()
        self.load(device_to, loaded + extra_memory, force_patch_weights, whole)
        return self.model.model_loaded_weight_memory - loaded

    def detach(self, unpatch_all=True):
        if unpatch_all:
            self.unpatch_model(self.offload_device, unpatch_weights=True)
        return self.model

    def pre_run(self):
        self.model.current_patcher = self

    def cleanup(self):
        self.model.current_patcher = None

    def __del__(self):
        self.detach(unpatch_all=False)


def _set_param(model, key, value):
    path, _, name = key.rpartition(".")
    made = torch.nn.Parameter(value, requires_grad=False)
    setattr(model.get_submodule(path), name, made)
