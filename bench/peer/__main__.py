"""Compare Flamboyance with another program on the same weights: `python -m bench.peer idefics` and `... llamacpp`.

A peer is imported only when it is requested, so that a comparison with transformers does not need llama.cpp.
"""

from __future__ import annotations

import importlib
import sys

PEERS = {"idefics": "transformers", "llamacpp": "llama-cpp-python"}  # and the package of each


def main() -> int:
    if sys.argv[1:2] not in [[peer] for peer in PEERS]:
        print(f"usage: python -m bench.peer {{{','.join(PEERS)}}} [--help] [...]", file=sys.stderr)
        return 2
    peer = sys.argv[1]
    try:
        module = importlib.import_module(f"bench.peer.{peer}")
    except ModuleNotFoundError as error:
        print(f"{error}: python -m pip install {PEERS[peer]}", file=sys.stderr)
        return 2
    status: int = module.main(sys.argv[2:])
    return status


if __name__ == "__main__":
    sys.exit(main())
