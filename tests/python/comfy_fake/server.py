"""The server's queue, as far as a node may reach it."""

from __future__ import annotations


class PromptQueue:
    """What is set is done when the prompt has ended."""

    def __init__(self, server=None):
        self.flags: dict = {}

    def set_flag(self, name, data):
        self.flags[name] = data


class PromptServer:
    """The one server of a process."""

    instance = None

    def __init__(self, loop=None):
        self.prompt_queue = PromptQueue(self)


PromptServer.instance = PromptServer()
