"""Prompts to calibrate with where the caller brings none."""

PROMPTS = (
    "a zebra in tall grass",
    "a portrait of an old fisherman, soft window light",
    "an empty beach at sunrise, calm sea",
    "a crowded night market in the rain, neon signs",
    "a red bicycle leaning on a white wall",
    "a macro photograph of a dragonfly on a leaf",
    "a watercolour of a mountain village",
    "a glass of water on a wooden table",
    "a knitted blanket with a geometric pattern",
    "a city skyline seen from a hill at dusk",
    "a bowl of ramen with a boiled egg, from above",
    "a minimalist poster of a single black circle on yellow",
    "a cat asleep on a stack of books",
    "an astronaut riding a horse in a desert",
    "a dense forest in autumn, fallen leaves",
    "a hand-written sign that says 'open'",
    "a blue porcelain vase with dried flowers",
    "a steam locomotive crossing a stone bridge",
    "a child's drawing of a house and a sun",
    "an aerial view of terraced rice fields",
)
"""Plain and textured scenes, people, text and drawings: what the cost of an image varies with."""

SOUNDS = (
    "ocean waves on a pebble beach, light wind",
    "a dog barks twice in a large empty hall",
    "heavy rain on a tin roof with distant thunder",
    "a woman speaks calmly in a quiet room",
    "a steam train starts and gathers speed",
    "birds sing in a forest at dawn",
    "a solo cello plays a slow melody",
    "a busy cafe, cups and many voices",
    "an old clock ticks and strikes three",
    "footsteps on dry leaves",
    "an upright piano plays a fast ragtime",
    "a motorcycle passes from left to right",
    "a crowd cheers and claps in a stadium",
    "a kettle begins to boil and whistles",
    "drums and an electric bass, a steady groove",
    "a small fire crackles at night",
)
"""The same for models of sound: noise, speech, music, and what begins and ends."""
