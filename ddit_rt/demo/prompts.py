"""Prompts for the demo model."""

from ddit_rt.demo.pictures import all_attributes, is_held_out

# The sequence length that the demo model was trained with; pass it to the pipeline.
MAX_SEQUENCE_LENGTH = 16

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
