"""Where model files are."""

from __future__ import annotations

#: File name to path.
names: dict = {}


def get_filename_list(folder_name):
    return [*names, *names]  # as ComfyUI's, when a folder is listed under two names


def get_full_path(folder_name, filename):
    return names.get(filename)
