"""Style LoRAs that requests name: one folder of the operator's, and what is loaded of it.

A LoRA is fused in place, so nothing is compiled again, and taken out to the bit. Its factors stay
loaded for the next request with it, which then reads no file.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from ddit_rt.engine import Engine
from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.schema import Lora

_ENDING = ".safetensors"
State = tuple[Lora, int, int]
"""A style with its file's time and size: one that was replaced is another."""


class Styles:
    """The LoRAs of a folder; but for `file`, used in the worker's thread alone.

    Attributes:
        state: What acts; None: the model is its own.
    """

    def __init__(self, engine: Engine, folder: Path, most: int) -> None:
        """Loads nothing yet.

        Args:
            engine: The engine whose weights they go into.
            folder: Folder with the files `NAME.safetensors`.
            most: Bytes of LoRAs to keep loaded beside the one that acts.
        """
        self.state: State | None = None
        self._engine = engine
        self._folder = folder
        self._most = most
        self._loaded: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def switch(self, style: Lora | None) -> None:
        """Makes the weights those of a style, or the model's own.

        Raises:
            ApiError: Its file is gone.
            ValueError: It cannot be read, or does not fit the model; nothing of it acts then.
        """
        wanted = None if style is None else self._state(style)
        if wanted == self.state:
            return
        if wanted is None:
            self._engine.set_loras({})
        else:
            self._load(wanted)
            self._engine.set_loras({wanted[0].name: wanted[0].scale})
        self.state = wanted
        self._make_room()

    def _load(self, wanted: State) -> None:
        """Loads one, or what its file has become, and does not let it act yet."""
        style, *stamp = wanted
        if self._loaded.get(style.name) == tuple(stamp):
            self._loaded.move_to_end(style.name)
            return
        if self._loaded.pop(style.name, None) is not None:
            self._engine.unload_loras(style.name)
            if self.state is not None and self.state[0].name == style.name:
                self.state = None
        file = self.file(style)
        self._engine.load_lora(
            str(file.parent), 0, style.name, weight_name=file.name, use_safetensors=True
        )
        self._loaded[style.name] = (stamp[0], stamp[1])

    def _make_room(self) -> None:
        """Unloads what has not acted for longest."""
        acts = None if self.state is None else self.state[0].name
        idle = [name for name in self._loaded if name != acts]
        while sum(self._loaded[name][1] for name in idle) > self._most:
            self._engine.unload_loras(idle[0])
            del self._loaded[idle.pop(0)]

    def _state(self, style: Lora) -> State:
        status = self.file(style).stat()
        return style, status.st_mtime_ns, status.st_size

    def file(self, style: Lora) -> Path:
        """Finds a style's file in the folder: no path is made of a request's text.

        Raises:
            ApiError: It is not there.
        """
        files = {file.stem: file for file in self._folder.iterdir() if file.suffix == _ENDING}
        if style.name not in files:
            raise ApiError(
                400, "this server has no LoRA of that name", param="lora", code="lora_not_found"
            )
        return files[style.name]
