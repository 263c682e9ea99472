"""Write docs/paper.md and its pictures from the finished runs: `python -m evaluation.paper`.

Nothing is trained or measured. The last line of the output is JSON: the claims and how their signs compare.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from evaluation.paper.claims import claims
from evaluation.paper.evidence import read_evidence
from evaluation.paper.page import write_page
from evaluation.paper.pictures import draw_pictures

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.paper", description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of paper.md and of the folder paper")
    options = parser.parse_args()
    evidence = read_evidence()
    (options.docs / "paper.md").write_text(write_page(evidence), encoding="utf-8")
    draw_pictures(evidence, options.docs / "paper")
    print("\n".join(f"{claim.sign}: {claim.text}: {claim.measured}" for claim in claims(evidence)))
    print(json.dumps([asdict(claim) for claim in claims(evidence)]))


if __name__ == "__main__":
    main()
