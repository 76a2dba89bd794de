"""Programs to compile ahead, by name, longest first."""

RATES, BATCHES = 3, (128, 1)
"""Models that the parts compile (dense, 0.7, 0.5; in training the official structure last), and batch sizes."""


def programs(parts: set[str], *, toy: bool) -> list[str]:
    """The programs of these parts; in a dry run one each."""
    named = {
        "training": [f"training {i}" for i in ((1,) if toy else range(RATES))],
        "inference": ["inference 1 1"]
        if toy
        else [f"inference {i} {batch}" for batch in BATCHES for i in range(RATES)],
        "bandwidth": ["bandwidth"],
    }
    return [program for part, those in named.items() if part in parts for program in those]
