from __future__ import annotations

import pytest
import torch

from ddit_rt.torch_state import callers_modes, plain_defaults, shielded, without_autocast


def modes() -> tuple[bool, bool, bool]:
    """Whether autocast, inference mode and gradients are on."""
    autocast = torch.is_autocast_enabled("cpu")
    return autocast, torch.is_inference_mode_enabled(), torch.is_grad_enabled()


def test_shield_and_what_the_caller_gets_within() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        outside = modes()
        with shielded():
            assert modes() == (False, False, False)
            with shielded(), callers_modes():
                assert modes() == outside
                assert torch.get_autocast_dtype("cpu") is torch.bfloat16
                with shielded():  # an engine that a callback calls
                    assert modes() == (False, False, False)
                    with callers_modes():
                        assert modes() == outside
            assert modes() == (False, False, False)
        assert modes() == outside


def test_callers_modes_never_record_gradients() -> None:
    """As in the call of a diffusers pipeline."""
    with torch.enable_grad(), shielded(), callers_modes():
        assert not torch.is_grad_enabled()


def test_callers_modes_without_a_shield_are_those_that_are() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), callers_modes():
        assert modes() == (True, False, True)


def test_without_autocast_leaves_other_modes() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        with without_autocast():
            assert modes() == (False, True, False)
        assert torch.is_autocast_enabled("cpu")


def test_shield_ends_with_an_error() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(StopIteration), shielded():
            raise StopIteration
        assert modes() == (True, False, True)


def test_plain_defaults() -> None:
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        with plain_defaults():
            made = torch.zeros(1)
        assert (made.dtype, made.device.type) == (torch.float32, "cpu")
        made = torch.zeros(1)
        assert (made.dtype, made.device.type) == (torch.bfloat16, "meta")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_plain_defaults_change_nothing_that_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default dtype is the process's, so that other threads would see a change."""

    def refuse(_: object) -> None:
        raise AssertionError("the default dtype was set")

    monkeypatch.setattr(torch, "set_default_dtype", refuse)
    with plain_defaults():
        pass
