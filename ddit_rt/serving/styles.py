"""Style LoRAs that requests name: one folder of the operator's, and what is fused of it.

A LoRA is fused in place, so nothing is compiled again, and taken out to the bit. Its fused weights
are kept for the next request with it, which then reads no file and multiplies no factors.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from ddit_rt.engine import Engine
from ddit_rt.lora.fused import KeptLora
from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.jobs import Style

_ENDING = ".safetensors"
State = tuple[Style, int, int]
"""A style with its file's time and size: one that was replaced is another."""


class Styles:
    """The LoRAs of a folder; but for `check`, used in the worker's thread alone.

    Attributes:
        state: What is fused; None: the model is its own.
    """

    def __init__(self, engine: Engine, folder: Path, most: int) -> None:
        """Fuses nothing yet.

        Args:
            engine: The engine whose weights they go into.
            folder: Folder with the files `NAME.safetensors`.
            most: Bytes of fused weights to keep.
        """
        self.state: State | None = None
        self._engine = engine
        self._folder = folder
        self._most = most
        self._kept: OrderedDict[State, KeptLora] = OrderedDict()

    def check(self, style: Style) -> None:
        """Refuses a name that is not in the folder: no path is made of a request's text.

        Raises:
            ApiError: It is not there.
        """
        self._file(style)

    def switch(self, style: Style | None) -> None:
        """Makes the weights those of a style, or the model's own.

        Raises:
            ApiError: Its file is gone.
            ValueError: It cannot be read, or does not fit the model; then nothing is fused.
        """
        wanted = None if style is None else self._state(style)
        if wanted == self.state:
            return
        if self.state is not None:
            self._engine.unfuse_lora()
            self.state = None
        if wanted is None:
            return
        kept = self._kept.get(wanted)
        if kept is None:
            self._fuse(wanted)
        else:
            self._kept.move_to_end(wanted)
            self._engine.fuse_lora(kept)
        self.state = wanted

    def _fuse(self, state: State) -> None:
        style, file = state[0], self._file(state[0])
        self._engine.fuse_lora(
            str(file.parent), style.scale, weight_name=file.name, use_safetensors=True
        )
        kept = self._engine.keep_lora() if self._most else None
        if kept is not None and kept.nbytes <= self._most:
            self._kept[state] = kept
            while sum(one.nbytes for one in self._kept.values()) > self._most:
                self._kept.popitem(last=False)

    def _state(self, style: Style) -> State:
        status = self._file(style).stat()
        return style, status.st_mtime_ns, status.st_size

    def _file(self, style: Style) -> Path:
        files = {file.stem: file for file in self._folder.iterdir() if file.suffix == _ENDING}
        if style.name not in files:
            raise ApiError(
                400, "this server has no LoRA of that name", param="lora", code="lora_not_found"
            )
        return files[style.name]
