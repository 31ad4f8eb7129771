"""Counts on the meta device what a token of each known model needs, so that nobody else has to wait for it.

python scripts/specimens.py            writes duoserve/specimens.json
"""

from __future__ import annotations

import json

from duoserve.specimens import COUNTED, SPECIMENS, count, to_json


def main() -> None:
    found = {name: to_json(count(model, model.experts, model.trunk)) for name, model in SPECIMENS.items()}
    lines = ",\n".join(f' "{name}": {json.dumps(needs)}' for name, needs in found.items())
    COUNTED.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
