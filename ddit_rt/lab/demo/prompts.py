"""Prompts for the demo models."""

from ddit_rt.lab.demo.images import all_attributes, is_held_out
from ddit_rt.lab.demo.videos import all_video_attributes, is_held_out_video

MAX_SEQUENCE_LENGTH = 16
"""Text tokens that both demo models were trained with; pass it to the pipeline."""

IMAGE_CALL = {"height": 128, "width": 128, "max_sequence_length": MAX_SEQUENCE_LENGTH}
VIDEO_CALL = {
    "height": 64,
    "width": 64,
    "num_frames": 13,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
}
"""Arguments of a call with the size that a demo model was trained on."""

DEMO_PROMPTS = (
    "a red circle on plain blue",
    "a yellow star on plain green",
    "a purple square on plain yellow",
    "an orange triangle on plain red",
    "a black star on blue dots",
    "a cyan circle on red checkers",
    "a green triangle on yellow stripes",
    "a blue square on green rings",
)


VIDEO_PROMPTS = (
    "a red circle moving right on plain blue",
    "a green triangle moving down on plain yellow",
    "a purple square moving up on plain yellow",
    "a blue circle moving left on red stripes",
    "a black square moving left on green dots",
    "a yellow square moving right on green checkers",
)


def held_out_prompts(count: int | None = None) -> list[str]:
    """Captions whose combination of attributes was kept out of training.

    Args:
        count: How many, spread evenly over all of them; all where None.

    Raises:
        ValueError: If there are not that many.
    """
    captions = [a.caption for a in all_attributes() if is_held_out(a)]
    if count is None:
        return captions
    if not 0 < count <= len(captions):
        raise ValueError(f"count is {count}, expected 1 to {len(captions)}, or None for all")
    return [captions[i * len(captions) // count] for i in range(count)]


def held_out_video_prompts() -> list[str]:
    """Captions of videos whose combination of attributes was kept out of training."""
    return [a.caption for a in all_video_attributes() if is_held_out_video(a)]
