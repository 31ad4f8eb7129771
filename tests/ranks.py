"""One rank of a made-up run, for tests that end ranks: round after round rows go out and come back, and each carries the
generation it was sent in.

    AG, EG, STALL in the environment, and NEVER: the rank that is killed before it comes; arguments: a folder for its process
    id, rounds, "recover" or "stop"
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from dep_extension.comm import PeerLost, Role
from dep_extension.faults import LEFT, Bounds
from dep_extension.world import World, here, open_world


def exchange(world: World, number: int) -> None:
    """A round: each attention rank sends each expert rank up to two rows of (round, generation, itself), and gets them back
    with 1 added."""
    place = world.place
    if place.role is Role.ATTENTION:
        to = [(number + place.index + e) % 3 for e in range(place.eg)]
        mine = torch.tensor([[float(number), world.generation, place.index]]).repeat(sum(to), 1)
        world.counts(torch.tensor([[number, n] for n in to]), 2).wait()
        world.dispatch(mine, to, [0] * place.eg, 3).wait()
        back = world.combine(None, [0] * place.eg, to, 3).wait()
        assert torch.equal(back, mine + 1), (number, back)
        return
    counts = world.counts(None, 2).wait()
    assert (counts[:, 0] == number).all(), (number, counts)
    of = counts[:, 1].tolist()
    rows = world.dispatch(None, [0] * place.ag, of, 3).wait()
    assert (rows[:, 1] == world.generation).all(), f"a message of another generation than {world.generation}: {rows}"
    world.combine(rows + 1, of, [0] * place.ag, 3).wait()


def main(folder: str, rounds: str, manner: str) -> int:
    torch.set_num_threads(1)
    place = here(int(os.environ["AG"]), int(os.environ["EG"]))
    if os.environ.get("NEVER") == str(place.rank):
        os.kill(os.getpid(), signal.SIGKILL)
    bounds = Bounds(beat=0.1, stall=float(os.environ["STALL"]), join=30, form=30)
    world = open_world(place, torch.float32, bounds=bounds, poison=True)
    note = Path(folder) / f"rank-{place.rank}"
    note.with_suffix(".part").write_text(str(os.getpid()))
    note.with_suffix(".part").rename(note)
    number = 0
    while number < int(rounds):
        try:
            exchange(world, number)
            number += 1
            time.sleep(0.01)
        except PeerLost as lost:
            print(f"lost: {lost}", file=sys.stderr, flush=True)
            if manner == "stop":
                world.abandon()
                return LEFT
            try:
                loss = world.reform()
            except PeerLost as end:
                print(f"over: {end}", file=sys.stderr, flush=True)
                world.abandon()
                return LEFT
            print(f"formed: {world.generation} without {loss.ranks}", file=sys.stderr, flush=True)
            (Path(folder) / f"generation-{world.generation}-{place.rank}").touch()
            number = min(said[0] for said in world.gather([number])[: world.place.ag])
    (Path(folder) / f"done-{place.rank}").write_text(f"{number} rounds, generation {world.generation}")
    if place.rank == 0:
        print(f"{number} rounds, generation {world.generation}")
    world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
