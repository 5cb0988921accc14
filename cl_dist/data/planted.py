"""Synthetic texts with a planted phrase that determines the label, so that the exact rationale is known.

For tests, and for a recipe that needs no external data with rationales. A model learns them from a few hundred rows;
results do not transfer to real text.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

ROWS = 1200
STORY = (
    "the table near the window was taken by a family of four and the light fell on the floor while music played in the "
    "back of the room and people walked in and out with their coats on before the evening had begun so that we waited "
    "for some time at the door and talked about the weather and the road that had brought us here"
)
"""Source of the words around a phrase."""
THEMES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "food": {
        "good": ("the soup was delicious", "every dish tasted wonderful", "the cook is a genius"),
        "bad": ("the soup was cold", "every dish tasted stale", "the meat was burnt"),
    },
    "film": {
        "gripping": ("the plot kept us breathless", "no scene felt too long", "the ending is a masterpiece"),
        "dull": ("the plot went nowhere", "every scene felt endless", "the ending made us yawn"),
    },
    "place": {
        "garden": ("roses grew along the fence", "bees hummed over the lawn", "the pond was full of frogs"),
        "office": ("printers hummed in the corner", "the desks stood in rows", "somebody filed the invoices"),
        "harbour": ("boats rocked on the water", "gulls cried over the masts", "nets dried on the quay"),
    },
}
"""Phrases by theme and label."""


def planted(theme: str, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the rows of a theme: id, split, text, label, rationale (word offsets). 80 % are train rows."""
    labels = list(THEMES[theme])
    words = np.random.Generator(np.random.Philox(key=[seed, sorted(THEMES).index(theme)]))
    for number in range(ROWS):
        label = labels[number % len(labels)]
        phrase = THEMES[theme][label][int(words.integers(len(THEMES[theme][label])))].split()
        before, behind = (_filler(words, int(words.integers(4, 16))) for _ in range(2))
        yield {
            "id": f"{theme}-{number}",
            "split": (("test", "dev") + ("train",) * 8)[number // len(labels) % 10],  # balanced over labels
            "text": " ".join([*before, *phrase, *behind]),
            "label": label,
            "rationale": [[len(before), len(before) + len(phrase)]],
        }


def _filler(words: np.random.Generator, count: int) -> list[str]:
    story = STORY.split()
    start = int(words.integers(len(story) - count))
    return story[start : start + count]
